"""Trains the embedded chat model: `python -m tools.embedded_model.train --data DIR --out assets/model`.

One command on a CPU or a GPU (bf16, compiled). The learning rate rises, stays, and falls in a straight line
once the run is told to finish: after `--tokens`, or at any time by writing a number of steps into the file
`ANNEAL` in the work folder. With `--minutes` the clock decides instead: the last part of the time is the descent,
however many steps fit. A run that is stopped (SIGTERM, SIGINT) saves itself and goes on from there with the same
command. `--start` begins with the weights and the tokenizer of a finished model.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

from . import attention
from .corpus import RowMaker, read_texts, sample_for_tokenizer
from .curve import CURVE_FIELDS, append_row, whole_curve
from .tokenizer import BOS, END, PAD, as_chat_tokenizer, train_tokenizer
from .widening import widened

MAX_POSITIONS = 8192
STEEPEST_FALL = 0.02


@dataclass(frozen=True)
class ModelShape:
    """Sizes of the Llama that is trained."""

    vocab_size: int = 4096
    hidden_size: int = 256
    num_layers: int = 6
    num_query_heads: int = 4
    num_key_value_heads: int = 2
    mlp_size: int = 1376
    rope_theta: float = 20_000.0


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what is learned. `stages` are (row lengths, tokens until which they hold).

    The steps of a stage take its row lengths in turn: short rows are cheap, long ones teach recall from afar.
    """

    seed: int = 1
    tokens_per_step: int = 12_288
    stages: tuple[tuple[tuple[int, ...], float], ...] = (
        ((256,), 7e6),
        ((512,), 9e6),
        ((1024,), 12e6),
        ((1024, 512, 2048, 1024, 4096, 1024), float("inf")),
    )
    matrix_learning_rate: float = 0.02
    vector_learning_rate: float = 0.003
    weight_decay: float = 0.01
    warmup_steps: int = 100
    max_gradient_norm: float = 1.0

    def __post_init__(self) -> None:
        if any(self.tokens_per_step % length for lengths, _ in self.stages for length in lengths):
            raise ValueError(f"tokens_per_step must be a multiple of every row length, got {self.tokens_per_step}")

    def lengths_at(self, num_tokens: int) -> tuple[int, ...]:
        """The row lengths after `num_tokens` tokens."""
        return next(lengths for lengths, until in self.stages if num_tokens < until)


@dataclass(frozen=True)
class Clock:
    """Ends a run at a time: the learning rate falls to zero over the last `descent_seconds`."""

    finish_at: float
    descent_seconds: float

    def share(self, last: float = 0.0) -> float:
        """The factor on the learning rates now: 1 before the descent, 0 at the end.

        It falls by at most `STEEPEST_FALL` from the `last`: a run that was stopped for a while (SIGSTOP) walks down all
        the same.
        """
        by_time = min(1.0, max(0.0, (self.finish_at - time.monotonic()) / self.descent_seconds))
        return max(by_time, last - STEEPEST_FALL)


@dataclass
class Progress:
    """Where the run stands; `anneal_from` and `anneal_steps` are None until the final descent."""

    step: int = 0
    tokens: int = 0
    anneal_from: int | None = None
    anneal_steps: int | None = None

    def learning_rate_share(self, warmup_steps: int) -> float:
        """The factor on the learning rates at the present step: 0..1."""
        if self.is_done:
            return 0.0
        if self.anneal_from is not None:
            return 1 - (self.step - self.anneal_from) / self.anneal_steps
        return min(1.0, (self.step + 1) / warmup_steps)

    @property
    def is_done(self) -> bool:
        """Whether the descent has reached zero."""
        return self.anneal_from is not None and self.step >= self.anneal_from + self.anneal_steps


def build_model(shape: ModelShape) -> LlamaForCausalLM:
    """An untrained model of that shape in float32."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.mlp_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_query_heads,
            num_key_value_heads=shape.num_key_value_heads,
            head_dim=64,
            max_position_embeddings=MAX_POSITIONS,
            rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
            tie_word_embeddings=True,
        )
    )


def weighted_loss(
    model: LlamaForCausalLM, token_ids: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted mean cross-entropy in nats, and which targets it would choose; rows are `(B, T + 1)`."""
    logits = model(input_ids=token_ids[:, :-1], use_cache=False).logits.float()
    targets = token_ids[:, 1:]
    losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    weights = weights[:, 1:]
    return (losses * weights).sum() / weights.sum(), logits.argmax(-1) == targets


class Trainer:
    """The run: model, two optimizers (Muon for matrices, AdamW for the rest) and progress, saved together."""

    def __init__(
        self,
        *,
        shape: ModelShape,
        recipe: Recipe,
        rows: RowMaker,
        held_out_rows: RowMaker,
        device: str,
        compiled: bool,
    ) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.rows, self.held_out_rows, self.device = recipe, rows, held_out_rows, device
        self.model = build_model(shape).to(device)
        self.progress = Progress()
        matrices = [p for name, p in self.model.named_parameters() if p.ndim == 2 and "embed" not in name]
        matrix_ids = {id(p) for p in matrices}
        others = [p for p in self.model.parameters() if id(p) not in matrix_ids]
        self.optimizers = [
            torch.optim.Muon(matrices, lr=recipe.matrix_learning_rate, weight_decay=recipe.weight_decay, momentum=0.95),
            torch.optim.AdamW(others, lr=recipe.vector_learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self._loss = torch.compile(weighted_loss, dynamic=False) if compiled else weighted_loss

    def _batch(self, rows: RowMaker, step: int, num_tokens: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        token_ids, weights = rows.rows(step=step, num_rows=max(1, num_tokens // length), length=length)
        return torch.from_numpy(token_ids).to(self.device), torch.from_numpy(weights).to(self.device)

    def train_step(self, max_share: float = 1.0) -> float:
        """One step with at most `max_share` of the full learning rates; returns its loss."""
        recipe, progress = self.recipe, self.progress
        share = min(max_share, progress.learning_rate_share(recipe.warmup_steps))
        for optimizer, rate in zip(
            self.optimizers, (recipe.matrix_learning_rate, recipe.vector_learning_rate), strict=True
        ):
            for group in optimizer.param_groups:
                group["lr"] = rate * share
        lengths = recipe.lengths_at(progress.tokens)
        length = lengths[progress.step % len(lengths)]
        token_ids, weights = self._batch(self.rows, progress.step, recipe.tokens_per_step, length)
        with torch.autocast(self.device, torch.bfloat16):
            loss, _ = self._loss(self.model, token_ids, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.max_gradient_norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.tokens += token_ids[:, 1:].numel()
        return loss.item()

    @torch.no_grad()
    def held_out(self, *, num_tokens: int = 12_288) -> tuple[float, float]:
        """Loss on held-out rows, and the share of tokens to be copied that would be chosen."""
        length = max(self.recipe.lengths_at(self.progress.tokens))
        token_ids, weights = self._batch(self.held_out_rows, 0, num_tokens, length)
        with torch.autocast(self.device, torch.bfloat16):
            loss, is_right = weighted_loss(self.model, token_ids, weights)
        is_copied = weights[:, 1:] >= 4
        return loss.item(), is_right[is_copied].float().mean().item()

    def save(self, path: Path) -> None:
        """Writes model, optimizers and progress; the old file stays until the new one is whole."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "progress": asdict(self.progress),
        }
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    def load(self, path: Path) -> None:
        """Goes on from a file written by `save`."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, optimizer_state in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        self.progress = Progress(**state["progress"])


def export(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Writes float16 safetensors of at most 8 MB each, tokenizer, chat template, generation settings."""
    chat_tokenizer = as_chat_tokenizer(tokenizer, max_length=MAX_POSITIONS)
    ids = {name: tokenizer.token_to_id(token) for name, token in (("bos", BOS), ("eos", END), ("pad", PAD))}
    shipped = LlamaForCausalLM(model.config).half()
    shipped.load_state_dict({name: value.half().cpu() for name, value in model.state_dict().items()})
    for name, token_id in ids.items():
        setattr(shipped.config, f"{name}_token_id", token_id)
    shipped.generation_config = GenerationConfig(
        bos_token_id=ids["bos"], eos_token_id=ids["eos"], pad_token_id=ids["pad"], do_sample=False
    )
    shipped.save_pretrained(out, max_shard_size="8MB")
    chat_tokenizer.save_pretrained(out)


def load_weights(model: LlamaForCausalLM, folder: Path, *, seed: int) -> None:
    """Puts the weights of an exported model into `model`, which may have wider MLPs and else the same shape."""
    state = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    model.load_state_dict(widened(state, mlp_size=model.config.intermediate_size, seed=seed))


@dataclass
class Stop:
    """Set by SIGTERM or SIGINT: save and leave after the step in progress."""

    requested: bool = field(default=False)

    def __call__(self, *_: object) -> None:
        self.requested = True


def run(
    trainer: Trainer,
    work: Path,
    *,
    max_tokens: float,
    anneal_steps: int,
    report_every: int,
    clock: Clock | None = None,
) -> None:
    """Trains to the end of the descent or until stopped; keeps `curve.csv` and `checkpoint.pt`."""
    stop = Stop()
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    curve, losses, started, tokens_then = work / "curve.csv", [], time.monotonic(), trainer.progress.tokens
    clock_share = 1.0
    while not (trainer.progress.is_done or stop.requested):
        progress = trainer.progress
        if progress.anneal_from is None and ((work / "ANNEAL").exists() or progress.tokens >= max_tokens):
            asked = (work / "ANNEAL").read_text().strip() if (work / "ANNEAL").exists() else ""
            progress.anneal_from, progress.anneal_steps = progress.step, int(asked or anneal_steps)
        clock_share = clock.share(clock_share) if clock else 1.0
        if clock_share == 0:
            progress.anneal_from, progress.anneal_steps = progress.step, 0
        else:
            losses.append(trainer.train_step(clock_share))
        # A run that the clock ends right after a report has nothing to add.
        if losses and (progress.step % report_every == 0 or progress.is_done):
            seconds = time.monotonic() - started
            held_out_loss, recall_accuracy = trainer.held_out()
            values = (
                progress.step,
                progress.tokens,
                max(trainer.recipe.lengths_at(progress.tokens)),
                f"{min(clock_share, progress.learning_rate_share(trainer.recipe.warmup_steps)):.3f}",
                f"{sum(losses) / len(losses):.4f}",
                f"{held_out_loss:.4f}",
                f"{recall_accuracy:.4f}",
                f"{(progress.tokens - tokens_then) / seconds:.0f}",
            )
            append_row(curve, values)
            print(
                " ".join(f"{name}={value}" for name, value in zip(CURVE_FIELDS, values, strict=True)),
                flush=True,
            )
            trainer.save(work / "checkpoint.pt")
            losses, started, tokens_then = [], time.monotonic(), progress.tokens
    trainer.save(work / "checkpoint.pt")


def load_tokenizer(work: Path, texts: object, vocab_size: int) -> Tokenizer:
    """The run's tokenizer: learned from the training texts once, then read from the work folder."""
    path = work / "tokenizer.json"
    if not path.exists():
        train_tokenizer(sample_for_tokenizer(texts, num_characters=12_000_000), vocab_size=vocab_size).save(str(path))
    return Tokenizer.from_file(str(path))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with books/, stories/, chat/ and questions/")
    parser.add_argument("--out", type=Path, required=True, help="folder that receives the finished model")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("build/embedded_model"),
        help="folder of checkpoint, curve and tokenizer",
    )
    parser.add_argument("--tokens", type=float, default=60e6, help="tokens before the final descent (default 60e6)")
    parser.add_argument("--anneal-steps", type=int, default=600, help="steps of the final descent")
    parser.add_argument("--minutes", type=float, help="finish after this time, descent included, whatever --tokens")
    parser.add_argument("--descent", type=float, default=0.4, help="part of --minutes for the descent (default 0.4)")
    parser.add_argument("--start", type=Path, help="folder of a finished model to go on from, at the last stage")
    parser.add_argument("--rate", type=float, default=1.0, help="part of the full learning rates (with --start)")
    parser.add_argument("--seed", type=int, default=Recipe.seed, help="seed of weights and rows")
    parser.add_argument("--report-every", type=int, default=100, help="steps between reports and checkpoints")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    parser.add_argument("--no-compile", action="store_true", help="run without torch.compile")
    parser.add_argument("--export-only", action="store_true", help="write the latest checkpoint to --out and leave")
    parser.add_argument("--no-tiles", action="store_true", help="leave a CPU's AMX tiles unused: torch's own attention")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if options.start is not None and options.start.resolve() == options.out.resolve():
        # Run twice, it would begin with its own result and join its own curve to itself.
        parser.error(f"--out must be another folder than --start, got {options.out} for both; choose a new folder")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    clock = None
    if options.minutes is not None:
        seconds = 60 * options.minutes
        clock = Clock(time.monotonic() + seconds, options.descent * seconds)
    options.work.mkdir(parents=True, exist_ok=True)
    checkpoint, shape = options.work / "checkpoint.pt", ModelShape()
    if options.export_only:
        model = build_model(shape)
        model.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True)["model"])
        export(model, Tokenizer.from_file(str(options.work / "tokenizer.json")), options.out)
        return
    recipe = Recipe(seed=options.seed)
    if options.start is not None:
        recipe = replace(
            recipe,
            stages=recipe.stages[-1:],
            matrix_learning_rate=options.rate * recipe.matrix_learning_rate,
            vector_learning_rate=options.rate * recipe.vector_learning_rate,
        )
        shutil.copy(options.start / "tokenizer.json", options.work / "tokenizer.json")
    texts, held_out_texts = read_texts(options.data)
    tokenizer = load_tokenizer(options.work, texts, shape.vocab_size)
    trainer = Trainer(
        shape=shape,
        recipe=recipe,
        rows=RowMaker(texts, tokenizer, seed=recipe.seed),
        held_out_rows=RowMaker(held_out_texts, tokenizer, seed=recipe.seed, split="held_out"),
        device=options.device,
        compiled=not options.no_compile,
    )
    if options.device == "cpu" and attention.has_tiles() and not options.no_tiles:
        attention.use_tiles(trainer.model)
    if checkpoint.exists():
        trainer.load(checkpoint)
    elif options.start is not None:
        load_weights(trainer.model, options.start, seed=recipe.seed)
    run(
        trainer,
        options.work,
        max_tokens=options.tokens if clock is None else float("inf"),
        clock=clock,
        anneal_steps=options.anneal_steps,
        report_every=options.report_every,
    )
    if trainer.progress.is_done:
        export(trainer.model, tokenizer, options.out)
        before = options.start / "curve.csv" if options.start is not None else None
        (options.out / "curve.csv").write_text(whole_curve(options.work / "curve.csv", before), encoding="utf-8")


if __name__ == "__main__":
    main()
