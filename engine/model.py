"""Loads a model by name, folder or the embedded default, and makes sure that the bridge serves it.

Safetensors only, no remote code. A model whose attention would come out wrong through the bridge is
refused at load: its own cache and ours must give the same logits on a short prompt.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from jinja2 import TemplateError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from kvlens.engine import bridge
from kvlens.engine.cache import KVCache
from kvlens.engine.config import MethodConfig
from kvlens.engine.errors import ModelError
from kvlens.engine.facts import ModelFacts
from kvlens.engine.graph import GraphStep
from kvlens.engine.lean import LeanStep
from kvlens.engine.measure import device_name
from kvlens.engine.registry import method
from kvlens.engine.shape import ModelShape
from kvlens.engine.warm_up import warm_up_methods
from kvlens.kernels import dispatch

EMBEDDED = Path(__file__).resolve().parent.parent / "assets" / "model"

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_SELF_TEST_TOKENS = 24
_SELF_TEST_STEPS = 3
"""The last tokens come one by one: a graph warms up, is captured, and is run again."""
_SELF_TEST_TOLERANCE = {torch.float32: 5e-3, torch.float16: 5e-2, torch.bfloat16: 2.5e-1}
_SHORT_WAY_TOLERANCE = 1e-3
"""Both ways compute in fp32 and round keys and values to 16 bits, sometimes to a neighbour."""

Progress = Callable[[str], None]


@dataclass
class LoadedModel:
    """A network with its tokenizer, ready to decode.

    `cache_dtype` is what exact tokens are kept in: always 16 bits. `max_context` counts prompt and answer.
    `short_step` is the short way of a decode step where there is one; `notices` say why there is none.
    """

    name: str
    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    shape: ModelShape
    device: torch.device
    dtype: torch.dtype
    max_context: int
    is_embedded: bool = False
    end_tokens: frozenset[int] = field(default_factory=frozenset)
    short_step: LeanStep | GraphStep | None = None
    notices: list[str] = field(default_factory=list)
    _token_texts: dict[int, str] = field(default_factory=dict, repr=False)

    @cached_property
    def facts(self) -> ModelFacts:
        """What methods may ask of this model beyond its shape."""
        return ModelFacts(self.network, name="embedded" if self.is_embedded else self.name)

    @property
    def cache_dtype(self) -> torch.dtype:
        return torch.float16 if self.dtype == torch.float32 else self.dtype

    @property
    def device_name(self) -> str:
        return device_name(self.device)

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.network.parameters())

    @property
    def weight_bytes(self) -> int:
        extra = 0 if self.short_step is None else self.short_step.extra_bytes
        return extra + sum(parameter.nbytes for parameter in self.network.parameters())

    def new_cache(self, method_name: str, config: MethodConfig, **options) -> KVCache:
        """An empty cache of a method for this model. Raises: ValueError if the settings do not fit it."""
        cache_class = method(method_name).cache
        return cache_class(self.shape, config, device=self.device, dtype=self.cache_dtype, facts=self.facts, **options)

    def render_chat(self, messages: Sequence[dict[str, str]]) -> str:
        """A conversation by the model's own chat template, up to where its answer begins.

        A model without a template continues the plain text of the conversation.
        Raises: ModelError if the template refuses the conversation.
        """
        if self.tokenizer.chat_template is None:
            return _plain_text(messages)
        try:
            return self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except (TemplateError, ValueError) as error:
            raise ModelError(f"The chat template of {self.name} does not take this conversation: {error}") from error

    def encode(self, text: str, *, is_continued: bool = False) -> list[int]:
        """Tokens of rendered text; what a template has not written and the model expects comes first."""
        has_own_start = self.tokenizer.chat_template is not None or is_continued
        return self.tokenizer(text, add_special_tokens=not has_own_start).input_ids

    def encode_after(self, tokens: Sequence[int], text: str) -> list[int]:
        """Tokens of `text`, of which `tokens` may be a beginning that a model has written itself.

        Text that begins with exactly what `tokens` say keeps them: a model may spell an answer in other
        tokens than its tokenizer would, and must not have to read it again.
        """
        start = 1 if tokens and tokens[0] == self.tokenizer.bos_token_id else 0
        for skipped in {0, start}:
            written = self.tokenizer.decode(tokens[skipped:])
            if tokens and text.startswith(written):
                return [*tokens, *self.encode(text[len(written) :], is_continued=True)]
        return self.encode(text)

    def token_text(self, token: int) -> str:
        """One token as text, special ones too. Remembered: the likeliest tokens come again and again."""
        if token not in self._token_texts:
            self._token_texts[token] = self.tokenizer.decode([token])
        return self._token_texts[token]

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)


def _plain_text(messages: Sequence[dict[str, str]]) -> str:
    """A conversation as one text: an answer goes on where its prompt ended, a new prompt begins a paragraph."""
    text = ""
    for message in messages:
        content = message["content"]
        if message["role"] != "assistant":
            text += f"\n\n{content}" if text else content
        elif text[-1:].isspace() or content[:1].isspace():
            text += content
        else:
            text += f" {content}"
    return text


def load_model(
    name: str | None = None, *, device: str = "auto", dtype: str = "auto", max_context: int | None = None,
    progress: Progress | None = None,
) -> LoadedModel:  # fmt: skip
    """The model called `name`: a Hugging Face id, a folder, or None for the embedded one.

    Raises: ModelError with a sentence for the page: not found, gated, no safetensors, no room, not served.
    """
    say = progress or (lambda sentence: None)
    source = str(EMBEDDED) if name is None else name
    label = "embedded model" if name is None else Path(name).name if Path(name).is_dir() else name
    target = _device(device)
    bridge.install()
    say(f"Reading the configuration of {label}")
    config = _guarded(label, lambda: AutoConfig.from_pretrained(source))
    stored_dtype = getattr(config.get_text_config(), "dtype", None)
    context = _context(config, max_context)
    say(f"Loading {label}")
    tokenizer = _guarded(label, lambda: AutoTokenizer.from_pretrained(source))
    network = _guarded(
        label,
        lambda: AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=_dtype(dtype, target, config), use_safetensors=True,
            attn_implementation=bridge.NAME,
        ),
    )  # fmt: skip
    network = _guarded(label, lambda: network.to(target).eval())
    model = LoadedModel(
        label, network, tokenizer, ModelShape.of(config), target, network.dtype, context,
        is_embedded=name is None, end_tokens=_end_tokens(network, tokenizer),
    )  # fmt: skip
    with _kernels_watched(target, say):
        say(f"Checking that {label} gives the same answer through the bridge")
        _self_test(model)
        take_short_way(model, stored_dtype)
        say(f"Preparing the kernels for {label}")
        warm_up_methods(model)
    return model


def _kernels_watched(device: torch.device, say: Progress) -> AbstractContextManager:
    """Within it `say` hears how far the CPU kernels are, where they are compiled for the first time."""
    if device.type != "cpu":
        return nullcontext()
    from kvlens.kernels.native import jit

    return jit.watched(lambda count: say(f"Compiling the CPU kernels, once for this machine: {count} ready"))


def _guarded(label: str, load: Callable):
    """`load()`, its expected faults turned into sentences."""
    try:
        return load()
    except ModelError:
        raise
    except GatedRepoError as error:
        raise ModelError(
            f"{label} is gated: accept its terms on huggingface.co, log in there with `hf auth login` "
            "(or set HF_TOKEN) and load it again."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(
            f"There is no model called {label!r}. Give a Hugging Face id such as Qwen/Qwen3-0.6B or a folder."
        ) from error
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ModelError(f"{label} does not fit the memory of this device. Choose a smaller model.") from error
    except (HfHubHTTPError, OSError, ValueError, KeyError, ImportError) as error:
        if getattr(error, "errno", None) == 28:
            raise ModelError(f"The disk is full: {label} cannot be stored. Free some room and try again.") from error
        raise ModelError(f"{label} cannot be loaded: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"device must be auto, cpu, cuda or cuda:N; got {device!r}") from error
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ModelError("device is cuda, but torch finds no NVIDIA GPU here; use --device cpu")
    return target


def _dtype(dtype: str, device: torch.device, config) -> torch.dtype:
    if dtype != "auto":
        if dtype not in _DTYPES:
            raise ModelError(f"dtype must be auto or one of {', '.join(_DTYPES)}; got {dtype!r}")
        return _DTYPES[dtype]
    if device.type == "cpu":
        return torch.float32
    stored = getattr(config.get_text_config(), "dtype", None)
    return stored if stored in (torch.float16, torch.bfloat16) else torch.bfloat16


_WINDOW_IS_MASK = frozenset(("mistral", "ministral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"))
"""Model types whose sliding layers are their full ones under another mask."""


def _context(config, max_context: int | None) -> int:
    """Tokens of prompt and answer together; a sliding window that is wider drops out of the configuration."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or 2048
    window = getattr(text, "sliding_window", None)
    if window is not None and getattr(text, "use_sliding_window", True):
        kinds = {*(getattr(text, "layer_types", None) or ())}
        if len(kinds) > 1 and text.model_type not in _WINDOW_IS_MASK:
            raise ModelError(
                f"This model ({text.model_type}) cannot be served: it mixes layers of sliding and of full attention, "
                "which may differ in more than the mask. Choose a Llama, Mistral, Qwen2 or Qwen3."
            )
        # Inside the window sliding attention is plain causal attention.
        limit = min(limit, window)
        text.sliding_window = None
        if getattr(text, "layer_types", None):
            text.layer_types = ["full_attention"] * len(text.layer_types)
    if max_context is not None and max_context < 16:
        raise ModelError(f"max_context must be at least 16 tokens; got {max_context}")
    return limit if max_context is None else min(limit, max_context)


def _end_tokens(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    configured = network.generation_config.eos_token_id
    ids = configured if isinstance(configured, (list, tuple)) else [configured]
    return frozenset(token for token in (*ids, tokenizer.eos_token_id) if token is not None)


def _self_test(model: LoadedModel) -> None:
    """Raises: ModelError if our exact cache and the model's own give different logits."""
    ids = _test_ids(model)
    cache = model.new_cache("dense", method("dense").config())
    try:
        with torch.inference_mode():
            ours = _logits(model, ids, cache)
            model.network.set_attn_implementation("eager")
            theirs = _logits(model, ids, None)
    except ModelError as error:
        raise ModelError(f"{model.name} cannot be served. {error}") from error
    except Exception as error:
        raise ModelError(f"{model.name} cannot be served: {_first_line(error)}") from error
    finally:
        model.network.set_attn_implementation(bridge.NAME)
        cache.free()
    scale = theirs.abs().max().clamp(min=1.0)
    difference = ((ours - theirs).abs().max() / scale).item()
    if not difference <= _SELF_TEST_TOLERANCE[model.dtype]:
        raise ModelError(
            f"{model.name} cannot be served: through the bridge its logits differ by {difference:.2g} "
            "of their range from the model's own, so its answers would be wrong. Choose another model."
        )


def take_short_way(model: LoadedModel, stored_dtype: torch.dtype | None) -> None:
    """Give the model its short step if it has one and its logits are the network's; else note why not."""
    try:
        step, tolerance = _short_step(model, stored_dtype)
        difference = _difference(model, step)
        if not difference <= tolerance:
            raise ModelError(f"its logits differ by {difference:.2g} of their range from the model's own")
        model.short_step = step
    except (ModelError, AttributeError) as error:
        model.notices.append(f"Decode steps of {model.name} take the slow way through transformers: {error}.")


def _short_step(model: LoadedModel, stored_dtype: torch.dtype | None) -> tuple[LeanStep | GraphStep, float]:
    """The step, and how far its logits may be from the network's. Raises: ModelError if there is none here."""
    if model.device.type == "cpu":
        return LeanStep(model.network, stored_dtype), _SHORT_WAY_TOLERANCE
    if not dispatch.runs_triton("append_pack", model.device):
        raise ModelError(f"graphs need the Triton kernels, and KERNELS is {dispatch.requested()}")
    return GraphStep(model.network), _SELF_TEST_TOLERANCE[model.dtype]


def _difference(model: LoadedModel, step: LeanStep | GraphStep) -> float:
    """The largest difference of some steps' logits from the network's, in parts of their range.

    Raises: ModelError if a graph is meant and cannot be captured.
    """
    ids = _test_ids(model)
    caches = [model.new_cache("dense", method("dense").config()) for _ in range(2)]
    try:
        with torch.inference_mode():
            want = _logits(model, ids, caches[0])[1:]
            model.network(ids[:, :-_SELF_TEST_STEPS], past_key_values=caches[1])
            got = torch.cat([step.run(caches[1], [token]) for token in ids[0, -_SELF_TEST_STEPS:].tolist()])
        if isinstance(step, GraphStep) and step.reason(caches[1]) is not None:
            raise ModelError(f"a step cannot be captured as a graph ({step.reason(caches[1])})")
    finally:
        for cache in caches:
            cache.free()
    return ((got - want).abs().max() / want.abs().max().clamp(min=1.0)).item()


def _test_ids(model: LoadedModel) -> torch.Tensor:
    """A short prompt of tokens from all over the vocabulary. Shapes: `[1, T]`."""
    vocabulary = model.network.get_input_embeddings().num_embeddings
    return (torch.arange(_SELF_TEST_TOKENS, device=model.device) * 7 + 3).remainder(vocabulary).unsqueeze(0)


def _logits(model: LoadedModel, ids: torch.Tensor, cache: KVCache | None) -> torch.Tensor:
    """Logits of a prompt in one piece and of the further steps. Shapes: `[1 + steps, V]` fp32."""
    steps, past = [], cache
    for piece in (ids[:, :-_SELF_TEST_STEPS], *ids[:, -_SELF_TEST_STEPS:].split(1, dim=1)):
        result = model.network(piece, past_key_values=past, use_cache=True)
        past = result.past_key_values
        steps.append(result.logits[0, -1].float())
    return torch.stack(steps)
