"""Whole models of Hugging Face transformers on seqkern, against the same models in transformers' plain torch.

    python3 bench/end_to_end.py                     # two layers of mamba-130m's size at L = 1024
    python3 bench/end_to_end.py --family mamba2 --length 512 --dtype bfloat16
    python3 bench/end_to_end.py --family qwen3_next --hidden 1024

The model has random weights and no head: its input is embeddings. Both ways take turns, a ratio is that of medians,
and the difference is the largest one over the largest value, of outputs or of gradients.
"""

import argparse
import importlib.util
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = {"mamba": "Mamba", "mamba2": "Mamba2", "falcon_mamba": "FalconMamba", "qwen3_next": "Qwen3Next"}
BUDGET_S = 60  # no further round of a row after it


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--family", choices=FAMILIES, default="mamba")
    options.add_argument("--layers", type=int, default=2)
    options.add_argument("--hidden", type=int, default=768, help="a Mamba scan has twice as many channels")
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--length", type=int, default=1024)
    options.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--as-installed", action="store_true", help="set up nothing: use the seqkern that imports")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    if not options.as_installed:
        sys.path.insert(0, str(ROOT / "tools"))
        import bootstrap

        bootstrap.ensure("test")

    import torch
    import transformers

    from seqkern import compat

    own = modeling(options.family, "own")
    with compat.installed(force=True):
        on_seqkern = modeling(options.family, "on_seqkern")
    transformers.logging.set_verbosity_error()
    name = FAMILIES[options.family]
    config = getattr(transformers, f"{name}Config")(**sizes_of(options.family, options.hidden, options.layers))
    torch.manual_seed(0)
    models = {
        "transformers": getattr(own, f"{name}Model")(config),
        "seqkern": getattr(on_seqkern, f"{name}Model")(config),
    }
    models["seqkern"].load_state_dict(models["transformers"].state_dict())
    x = torch.randn(options.batch, options.length, options.hidden, dtype=getattr(torch, options.dtype))

    print(f"{name}: {options.layers} layers, batch {options.batch}, L = {options.length}, {options.hidden} wide,")
    print(f"{options.dtype}, transformers {transformers.__version__}, {torch.get_num_threads()} threads\n")
    print("| | seqkern | transformers | ratio | difference |\n| --- | --- | --- | --- | --- |")
    for title, kind in {"forward": Forward, "forward + backward": Training, "one token, cached": Step}.items():
        calls = {who: kind(model.to(x.dtype), x) for who, model in models.items()}
        row(title, calls, options.rounds)
    return 0


def sizes_of(family: str, hidden: int, layers: int) -> dict:
    sizes = {"vocab_size": 8, "hidden_size": hidden, "num_hidden_layers": layers}
    if family == "qwen3_next":  # layers with a gated delta rule, one with attention, which its cache needs, no experts
        heads = {"linear_num_key_heads": hidden // 256, "linear_num_value_heads": hidden // 128}
        kinds = [*layers * ["linear_attention"], "full_attention"]
        kinds = {"layer_types": kinds, "num_hidden_layers": len(kinds), "mlp_only_layers": list(range(len(kinds)))}
        return sizes | heads | kinds | {"intermediate_size": 2 * hidden}
    if family == "mamba2":  # of mamba2-130m, in chunks that suit transformers' plain torch best
        sizes |= {"head_dim": 64, "num_heads": 2 * hidden // 64, "n_groups": 1, "chunk_size": 64}
    return sizes | {"residual_in_fp32": False}


def modeling(family: str, suffix: str):
    """A fresh copy of a model's module: what it finds when it is imported stays with it."""
    spec = importlib.util.find_spec(f"transformers.models.{family}.modeling_{family}")
    spec = importlib.util.spec_from_file_location(f"{spec.name}_{suffix}", spec.origin)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(title: str, calls: dict, rounds: int) -> None:
    """Compares the two and times them in turns; where a round takes long, there is only one."""
    samples = {who: [] for who in calls}
    for _ in range(rounds + 1):
        results = {}
        for who, call in calls.items():
            begin = time.perf_counter()
            results[who] = call()
            samples[who].append(time.perf_counter() - begin)
        if sum(map(sum, samples.values())) > BUDGET_S:
            break
    warm = {who: statistics.median(times[1:] or times) for who, times in samples.items()}
    pairs = zip(results["seqkern"], results["transformers"], strict=True)
    difference = max(float((ours - theirs).abs().max() / theirs.abs().max()) for ours, theirs in pairs)
    ratio = warm["transformers"] / warm["seqkern"]
    cells = [f"{1e3 * warm[who]:.1f} ms" for who in ("seqkern", "transformers")]
    print(f"| {title} | {' | '.join(cells)} | {ratio:.1f} | {difference:.1e} |", flush=True)


class Forward:
    """Hidden states of the last layer, without gradients."""

    def __init__(self, model, x):
        self.model, self.x = model.eval(), x

    def __call__(self):
        import torch

        with torch.no_grad():
            return [self.model(inputs_embeds=self.x, use_cache=False).last_hidden_state]


class Training:
    """Gradients of all parameters."""

    def __init__(self, model, x):
        self.model, self.x = model.eval(), x

    def __call__(self):
        import torch

        y = self.model(inputs_embeds=self.x, use_cache=False).last_hidden_state
        parameters = [p for name, p in self.model.named_parameters() if "embed" not in name]
        return torch.autograd.grad(y, parameters, self.x)  # the input as some direction


class Step:
    """One more token after a prompt."""

    def __init__(self, model, x):
        import torch

        self.model, self.token = model.eval(), x[:, :1]
        with torch.no_grad():
            outputs = model(inputs_embeds=x[:, :16], use_cache=True)
        name = "cache_params" if "cache_params" in outputs else "past_key_values"
        self.cache = {name: outputs[name]}

    def __call__(self):
        import torch

        with torch.no_grad():
            out = self.model(inputs_embeds=self.token, **self.cache, use_cache=True)
        return [out.last_hidden_state]


if __name__ == "__main__":
    sys.exit(main())
