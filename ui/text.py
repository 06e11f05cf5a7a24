"""Every sentence that a person reads, in plain words: what it is, why it matters, what to do.

`CLIENT` goes to the page's scripts as it is; `{braces}` there are filled by the script.
"""

from kvlens.ui.units import bytes_text, count_text

TITLE = "KVLens"
TAGLINE = "a playground and microscope for compressed KV caches"
DESCRIPTION = (
    "Chat with a real language model in two lanes, one with a plain fp16 cache and one with a compressed "
    "cache, and watch what the compression costs and saves while the tokens arrive."
)

SERVING = "KVLens is at {address}"
TAB_CHAT = "Chat"
TAB_LAB = "Throughput"
TAB_ABOUT = "About"

PROMPT_PLACEHOLDER = "Ask both lanes the same thing"
SEND = "Send"
STOP = "Stop"
REGENERATE = "Regenerate"
EDIT_LAST = "Edit last"
CLEAR = "Clear"
THEN_ASK = "Then ask"
SETTINGS = "Sampling and system prompt"
SYSTEM_PROMPT = "System prompt"
SYSTEM_PROMPT_HINT = "Optional. Said to the model before the first turn, in both lanes."
MAX_NEW_TOKENS = "Most new tokens"
MAX_NEW_TOKENS_HELP = "An answer ends here if the model has not ended it before."
TEMPERATURE = "Temperature"
TEMPERATURE_HELP = "0 always takes the likeliest token."
TOP_P = "Top-p"
TOP_P_HELP = "Draw only from the likeliest tokens that together have this probability."
SEED = "Seed"
SEED_HELP = "Every lane draws with the same noise, so only the cache differs."
LANE_EMPTY = "The answer appears here."

EMPTY_PROMPT = "Type something first: an empty prompt has nothing to answer."
NOTHING_TO_REGENERATE = "There is no answer to make again yet. Send a prompt first."
NOTHING_TO_EDIT = "There is no prompt of yours to edit yet."
NOTHING_TO_EXPORT = "There is no run to export yet. Send a prompt first."
CONVERSATION_LOST = (
    "The conversation of this page was let go: it was away for long, or another model was loaded. What you see can "
    "still be copied; the next prompt begins anew."
)
MODEL_CHANGED = "Now serving {name}. Conversations start anew."
MODEL_CHANGE_OFF = "The model of this page is fixed by whoever runs it."
MODEL_NAME_EMPTY = "Type the name of a Hugging Face model or a folder on this machine."
MODEL_NOT_ALLOWED = "This page only offers: {names}."
MODEL_LOADING = "Loading {name} …"
STILL_LOADING = "The model is still loading, and this prompt has waited long enough. Send it again later."
MODEL_FAILED = "The model could not be loaded: {reason}"
IMPORT_FAILED = "This file is not a run exported from KVLens: {reason}"
RUN_TOO_LARGE = "it is larger than {limit} MiB."
UNKNOWN_RUN = "That recorded run is not here any more."
INTERNAL_FAULT = "Something broke while this ran ({kind}). The page goes on: send again, or clear the chat if it stays."
ADDRESS_FAULT = "The address asked for something this page does not have, so the default was taken: {reason}"


def prompt_too_long(length: int, limit: int) -> str:
    return f"This prompt has {count_text(length)} characters; the page takes up to {count_text(limit)}. Shorten it."


def context_filling(used: int, limit: int) -> str:
    return (
        f"The context is nearly full: {count_text(used)} of {count_text(limit)} tokens. "
        "Clear the chat before it ends in mid-answer."
    )


def context_full(limit: int) -> str:
    return f"The context is full: {count_text(limit)} tokens, prompt and answers together. Clear the chat to go on."


LEARN_NOT_WHOLE = "The request to learn did not arrive whole; reload the page."
LEARN_REFUSED = "This page does not learn dictionaries."
LEARNING_OFF = "This page does not learn dictionaries. {reason}"


def lane_lacks(kind: str) -> str:
    return f"This lane codes with a dictionary that has not been learned for this model yet: {kind}."


def prompt_held(kind: str) -> str:
    return (
        f"The dictionary {kind} has not been learned for this model yet. Learn it in its lane or change the settings."
    )


def learn_text_too_long(length: int, limit: int) -> str:
    return f"This text has {count_text(length)} characters; learning takes up to {count_text(limit)}. Shorten it."


def learn_too_slow(seconds: float, kind: str) -> str:
    return (
        f"Learning took longer than the {seconds / 60:.0f} minutes that this page allows. On your own machine, run: "
        f"python -m kvlens.engine.dictionaries train --kind {kind}"
    )


def recorded_label(model: str, device: str, date: str) -> str:
    return f"Recorded run: {model}, {device}, {date}"


def lane_estimate(num_tokens: int, live_bytes: int, fp16_bytes: int, num_values: int) -> str:
    bits, ratio = 8 * live_bytes / num_values, fp16_bytes / live_bytes
    saving = f"{ratio:.1f}× smaller" if ratio >= 1 else f"{1 / ratio:.1f}× larger"
    return (
        f"At {count_text(num_tokens)} tokens of this model: {bytes_text(live_bytes)}, "
        f"{saving} than fp16, {bits:.2f} bits per value."
    )


def why_memory(
    kv_bytes: int, fp16_bytes: int, weight_bytes: int, process_bytes: int, lane: str, prompt_atom_bytes: int = 0
) -> str:
    """The answer to `compressed, but the memory of the process did not fall`."""
    share = 100 * kv_bytes / max(1, process_bytes)
    share_text = "under 0.1 %" if share < 0.1 else f"{share:.1f} %"
    saved = fp16_bytes - kv_bytes
    if saved <= 0 and prompt_atom_bytes:
        return (
            f"{lane} keeps {bytes_text(prompt_atom_bytes)} of atoms taken from the prompt, more than its codes save at "
            "this length. They do not grow with the conversation, and the saving does: see 32k and 128k."
        )
    if saved <= 0:
        return (
            f"So far {lane} holds its tokens exactly, so nothing is saved yet: what it packs are tokens that "
            "have left its exact window. Go on talking, or take a shorter window."
        )
    return (
        f"{lane} keeps {bytes_text(kv_bytes)} instead of {bytes_text(fp16_bytes)}, yet the process hardly "
        f"shrinks: its cache is {share_text} of the {bytes_text(process_bytes)} held, which are mostly the "
        f"weights ({bytes_text(weight_bytes)}) and the program. The saving grows with every token: see 32k and 128k."
    )


FINISH = {
    "end": "ended by the model",
    "length": "limit reached",
    "context": "the context is full",
    "stopped": "stopped",
}

CLIENT = {
    "finish": FINISH,
    "parts": {
        "codes": "codes",
        "scales": "scales and zeros",
        "indices": "indices",
        "coefficients": "coefficients",
        "window": "exact window",
        "sinks": "exact sinks",
        "tables": "tables",
        "dictionary": "prompt dictionary",
        "scratch": "scratch",
    },
    "part_help": {
        "codes": "The packed values themselves, a few bits each.",
        "scales": "What turns codes back into numbers: a scale and a zero for every group.",
        "indices": "Which atoms of the dictionary add up to each vector.",
        "coefficients": "How much of each atom.",
        "dictionary": "Vectors of this prompt that serve as atoms too. They belong to this conversation.",
        "window": "Tokens still held exactly, in 16 bits.",
        "sinks": "The first tokens, kept exactly for good.",
    },
    "lane": {
        "tokens_per_second": "tok/s",
        "bits": "bits",
        "smaller": "× smaller",
        "larger": "× larger",
        "same": "the reference",
        "speed_ratio": "× fp16",
        "no_ratio": "no fp16 lane to compare",
        "kv": "KV",
        "of_fp16": "as in fp16",
        "everything": "per value",
        "prefilled": "read {new} tokens in {ms}",
        "reused": "read {new} tokens in {ms}, {reused} kept",
        "told": "{n} new, {finish}",
        "parts_at": "parts from {other} at token {n}",
        "together": "same tokens so far",
        "identical": "same answer, token for token",
        "simulated": "Simulated: it rounds but stores fp16, so its bytes are what it would take, not what it takes.",
        "method": "Method",
        "preset": "Preset",
        "custom": "custom",
        "default": "default",
        "settings": "Settings of this lane",
        "nothing_to_set": "Nothing to set: every token is kept exactly, in 16 bits.",
        "on": "on",
        "off": "off",
        "none": "none",
        "bits_help": "All bytes of the cache, scales and exact tokens included, over all the values it stands for.",
        "bytes_help": "Bytes that the stored keys and values occupy now, and how many times smaller than plain fp16.",
        "speed_help": "Tokens per second of this lane's own decode steps, without the other lane's turns.",
        "jump": "Show the token where the answers part",
    },
    "learn": {
        "go": "Learn it here",
        "again": "Learn it again",
        "stop": "Stop",
        "busy": "Another dictionary is being learned on this page; this one can follow it.",
        "own_text": "From a text of your own",
        "own_text_hint": "Optional, and best if like what you will ask. Without it, KVLens reads a text of its own.",
        "added_text_hint": "Optional, up to {n} characters. It is read together with KVLens' own text.",
        "about": "The model reads a text, and atoms are learned from its keys and values. Minutes, once for a model.",
        "waiting": "Waiting for the engine: another run goes first.",
        "reading": "Reading the text …",
        "learning": "Layer {layer}, {side}: {error} of the squared norm missing so far",
        "starting": "Layer {layer}, {side}",
        "stopping": "Stopping …",
        "stopped": "Stopped. Nothing was kept.",
        "done": "Learned. This lane is ready.",
        "progress": "Learning",
    },
    "chat": {
        "recorded_hint": "Nothing is computed yet. Send a prompt to run it here.",
        "replay": "Replay",
        "waiting": "Waiting for the engine: another run goes first.",
        "reading": "Reading the prompt …",
        "loading": "The model is loading; the run starts by itself.",
        "probability": "probability {p}",
        "alternatives": "instead of it",
        "parted_here": "the answers part here",
    },
    "memory": {
        "title": "KV memory",
        "subtitle": "bytes by part while the cache grows",
        "tokens": "tokens in the cache",
        "fp16": "fp16",
        "total": "all parts",
        "fp16_row": "the same in fp16",
        "reserved": "allocated for it",
        "machine": "Beside it",
        "process": "this process",
        "weights": "weights",
        "allocated": "device, allocated",
        "peak": "device, peak",
        "used": "device, in use",
        "of": "{used} of {total}",
        "no_device": "none",
        "device": "device memory",
        "projection": "At longer context, by formula",
        "at_tokens": "{n} tokens",
        "probe": "The microscope's own exact copies ({bytes}) are not counted.",
        "shared": "dictionaries",
        "shared_note": "shared by all conversations",
        "shared_help": (
            "Learned once for the model and read by every conversation, as its weights are. Not part of the cache: its "
            "bits per value count what each conversation adds."
        ),
    },
    "errors": {
        "title": "Error",
        "subtitle": "of the packed cache against the lane's own exact tensors",
        "keys": "K",
        "values": "V",
        "keys_title": "Keys",
        "values_title": "Values",
        "figures": {"tokens": "layer × token", "channels": "channel × token", "heads": "layer × head"},
        "quantities": {"magnitude": "exact magnitude", "rebuilt": "rebuilt", "error": "error"},
        "quantity_axis": {"magnitude": "|exact|", "rebuilt": "|rebuilt|", "error": "|exact − rebuilt|"},
        "layer": "Layer",
        "head": "Head",
        "channel": "channel",
        "token": "token",
        "relative": "relative error",
        "exact": "still exact",
        "mean": "mean {error}",
        "layer_next": "Layer {n} comes under the microscope with the next run.",
        "pooled": "one column is {n} tokens",
        "none": "No error to show: every token is still exact.",
        "none_hint": "A compressed lane packs tokens once they leave its exact window.",
        "no_probe": "The next run looks inside a layer and fills this picture.",
        "outliers": "Steady bright rows are outlier channels of the keys: why KIVI scales keys by channel.",
        "value_note": "Values seldom have such steady channels, so KIVI scales them by token.",
        "axis": {"tokens": "token", "channels": "token", "heads": "head"},
    },
    "atoms": {
        "title": "Atoms",
        "subtitle": "what the sparse codes are made of: each vector is a sum of a few atoms of a learned dictionary",
        "vectors": {"keys": "key", "values": "value"},
        "usage": "How often each atom is used",
        "usage_axis": "atoms, the most used first",
        "usage_unit": "times",
        "usage_told": "{used} of {n} atoms used by this head, {any} by any head of the layer, {dead} by none.",
        "energy": "Energy brought back",
        "energy_axis": "atoms",
        "energy_told": "All atoms together: {keys} of the keys, {values} of the values.",
        "energy_mean": "0 atoms is the mean of the head, which is kept beside the atoms.",
        "energy_unknown": "No exact vector of this layer is known yet.",
        "coverage": "Dictionary in use, by layer",
        "coverage_axis": "layer",
        "coverage_told": "Atoms used at least once in this conversation, of all that the layer has.",
        "vector": "One {kind}, atom by atom",
        "token": "Token",
        "token_number": "token {n}",
        "newest": "newest",
        "newest_help": "Follow the newest token that was coded",
        "channel": "channel",
        "exact": "exact",
        "sum": "sum of {n} atoms",
        "start": {"mean": "mean of the head", "nothing": "nothing yet"},
        "step": "{c} × atom {n}",
        "missing": "{error} missing",
        "missing_help": "The norm of what is missing, as a share of the exact vector's",
        "still_exact": "Token {asked} is still exact: this is the nearest one that is coded.",
        "unknown": "This token was coded before its layer came under the microscope: its exact {kind} was not kept.",
        "click": "A click on the error picture chooses a token too.",
        "none": "Nothing is coded yet: every token is still exact.",
        "none_hint": "Tokens are coded once they leave the exact window.",
    },
    "speed": {
        "title": "Speed",
        "subtitle": "each step timed by itself",
        "decode": "decode",
        "prefill": "prefill",
        "first": "first token after",
        "tokens_per_second": "tokens/s",
        "token": "new token",
        "turns": "Lanes take turns on one device, so each streams slower than its own tokens/s.",
        "cpu": "These speeds are this CPU's. Bytes are exact on every machine.",
        "path": "Attention",
    },
    "header": {
        "parameters": "weights",
        "context": "context {n}",
        "context_used": "{used} of {limit} tokens",
        "context_label": "Context",
        "budget_label": "KV budget",
        "budget_used": "{used} of {limit}",
        "budget_help": "What all caches of this server may hold together, and what they hold now.",
        "recorded": "Recorded runs",
        "link": "Copy link",
        "copied": "Copied",
        "export": "Export",
        "export_json": "This run (JSON, can be imported)",
        "export_csv": "Its steps (CSV)",
        "import": "Import a run …",
        "help": "Help",
        "theme": "Light or dark",
        "change_model": "Another model",
        "model_hint": "Hugging Face name or folder",
        "load": "Load",
        "loading": "loading a model …",
        "no_model": "no model",
        "cpu": "CPU: speeds are this machine's own. Bytes are exact everywhere.",
        "none_recorded": "No recorded runs are installed.",
        "demonstration": "The embedded model is a demonstration, small enough to ship. Real ones, from Hugging Face:",
    },
    "help": [
        ["Two lanes, one prompt", "Both lanes are the same model. Only the cache of keys and values differs."],
        ["Bits per value", "All bytes of the cache, scales and exact tokens included, over all values it stands for."],
        ["× smaller", "The bytes of a plain fp16 cache of the same tokens, over the bytes held."],
        ["Where they part", "Once one token differs, the texts are no longer comparable word by word."],
        ["Hover a finished answer", "It shows each token's probability and what nearly stood there."],
        ["Keys", "Enter sends · Shift+Enter new line · Esc stops · / goes to the prompt · ? opens this."],
    ],
}

ABOUT_INTRO = """
A language model keeps a key and a value of every token it has read, in every layer. At long context this
**KV cache** outgrows the weights. Many methods compress it. KVLens runs them for real, next to the exact
cache, and shows what they save and what they cost while you talk to the model.
"""
ABOUT_METHODS = "## Methods"
ABOUT_NUMBERS = """
## How the numbers are measured

- **Bytes** are summed from the real tensors of the cache: codes, scales, exact window, everything. They are
  exact on every machine. *All parts* is what the stored tokens occupy; *allocated* is what is set aside for them.
- **Bits per value** and **× smaller** count everything, the exact window included. A short chat is mostly window, so
  little is saved there; the longer the context, the closer it comes to the method's own rate.
- **Error** is taken where a block is known both exactly and packed: at the moment it is packed. It is the norm of the
  difference over the norm of the exact part, always against the lane's own exact tensors.
- **Speed** is the model's step alone. Lanes take turns and each step is timed by itself, so they do not spoil each
  other's figures. Reading the prompt (prefill) and answering (decode) are reported apart; warm-up is not counted.
- **Dictionaries** (CSR) are learned once for a model and read by all conversations, as its weights are. They stand
  beside the cache and are not in its bits per value. Atoms taken from a prompt belong to its conversation and are.
- **32k and 128k** come from the same formula that the real bytes are checked against, to the byte.
"""
ABOUT_LIMITS = """
## What the built-in model can and cannot do

The model that comes with KVLens is very small, so that the page works on any machine without a download. It can chat
simply, tell little stories and recall facts given in its prompt. It knows little about the world, it makes
mistakes, and compression hurts a small model more than a large one. It is a demonstration. For figures that matter to
you, load a real one, by the model menu above where this page allows it or with `python app.py --model NAME`:
{names}, or any other Llama, Mistral or Qwen in safetensors, by its Hugging Face name or as a folder.
"""
ABOUT_API = """
## From a program

```python
from gradio_client import Client

client = Client("{address}")
print(client.predict(api_name="/methods"))
print(client.predict("kivi", {{"num_layers": 32, "num_query_heads": 32, "num_kv_heads": 8, "head_dim": 128}},
                     32768, api_name="/estimate"))
job = client.submit("Tell me a story about a heron.", api_name="/compare")
for update in job:
    print(update["lanes"]["b"]["live_bytes"])
```
"""
METHODS_HEADERS = ("Method", "What it does", "Bits per value at 32k", "Source")
