"""KVLens: parse arguments, build the engine, launch."""

import argparse
import os


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Each option is an environment variable too: `--max-context` is `KVLENS_MAX_CONTEXT`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def option(name: str, default, **rest) -> None:
        variable = "KVLENS_" + name.strip("-").replace("-", "_").upper()
        parser.add_argument(name, default=os.environ.get(variable, default), **rest)

    option("--model", None, help="Hugging Face name or folder; without it, the built-in model")
    option("--device", "auto", help="auto, cpu, cuda or cuda:N")
    option("--dtype", "auto", help="auto, float32, bfloat16 or float16")
    # A Hugging Face Space is reached from outside its container, and its model is not for a stranger to change.
    is_public = "SPACE_ID" in os.environ
    option("--host", "0.0.0.0" if is_public else "127.0.0.1", help="address to listen on; 0.0.0.0 for all")
    option("--port", 7860, type=int, help="port to listen on")
    option("--max-context", None, type=int, help="most tokens of prompt and answer together")
    option(
        "--kv-budget", None, type=int, help="most MiB that all KV caches may reserve; a share of the memory if not set"
    )
    option("--kernels", "auto", choices=("auto", "triton", "cpu", "reference"), help="which kernels to use")
    option(
        "--offer-models",
        "none" if is_public else None,
        help="comma-separated models that visitors may choose; 'none' fixes the model",
    )
    option("--learning", "on", choices=("on", "off"), help="whether visitors may have dictionaries learned on the page")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse_arguments()
    os.environ["KERNELS"] = options.kernels
    print("KVLens starts: loading torch, transformers and the page", flush=True)

    import kvlens.ui  # noqa: F401  before torch is loaded: says how its threads wait
    from kvlens.engine import light_imports

    light_imports.load()
    from kvlens.ui.models import ModelHub, ModelRequest, parse_offer
    from kvlens.ui.server import serve

    budget_bytes = None if options.kv_budget is None else options.kv_budget * 2**20
    request = ModelRequest(options.model, options.device, options.dtype, options.max_context, budget_bytes)
    hub = ModelHub(request, offered=parse_offer(options.offer_models), can_learn=options.learning == "on")
    serve(hub, host=options.host, port=options.port)


if __name__ == "__main__":
    main()
