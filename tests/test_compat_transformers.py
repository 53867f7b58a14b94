"""Hugging Face's Mamba models with seqkern under them, against the same models in transformers' own plain torch."""

import importlib.util
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from seqkern import compat

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="transformers 5 needs Python 3.11")

LAYERS, B, L, VOCABULARY = 2, 2, 17, 40
MAMBA = {"state_size": 5, "use_bias": True}
MAMBA2 = MAMBA | {"num_heads": 6, "head_dim": 8, "n_groups": 2, "chunk_size": 8}
FAMILIES = {"mamba": ("Mamba", MAMBA), "falcon_mamba": ("FalconMamba", MAMBA), "mamba2": ("Mamba2", MAMBA2)}
SCANS = {"mamba": "selective_scan", "falcon_mamba": "selective_scan", "mamba2": "linear_attention"}


def test_version_is_the_one_that_the_project_names():
    import transformers

    project = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text()
    assert re.search(r'"transformers==([\d.]+)', project)[1] == transformers.__version__


def modeling(family, suffix):
    """A fresh copy of a model's module: what it finds when it is imported stays with it."""
    spec = importlib.util.find_spec(f"transformers.models.{family}.modeling_{family}")
    spec = importlib.util.spec_from_file_location(f"{spec.name}_{suffix}", spec.origin)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """(name of the family, its module as it is, its module on seqkern)."""
    own = modeling(request.param, "own")
    with compat.installed(force=True):
        return request.param, own, modeling(request.param, "on_seqkern")


def same_models(own, on_seqkern, name, config):
    """One model in transformers' own torch and one on seqkern, with the same weights, in evaluation mode."""
    torch.manual_seed(0)
    model = getattr(own, name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases begin as zeros
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours = getattr(on_seqkern, name)(config).eval()
    ours.load_state_dict(model.state_dict())
    return model, ours


@pytest.fixture
def models(family):
    """The family's module as it is, and the same model in both, in evaluation mode."""
    import transformers

    family, own, on_seqkern = family
    name, sizes = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=LAYERS, pad_token_id=0, **sizes
    )
    return own, *same_models(own, on_seqkern, f"{name}ForCausalLM", config)


@pytest.fixture
def scan(family):
    """The operator that its layers run on, without fwd, bwd or step."""
    return SCANS[family[0]]


@pytest.fixture
def tokens():
    """Two rows, and a mask: the second is padded on the left."""
    ids = torch.randint(1, VOCABULARY, (B, L), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    return ids * mask, mask


class Calls(TorchDispatchMode):
    """Counts the calls of seqkern's operators."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "seqkern":
            self.counts[function._opname] += 1
        return function(*args, **(kwargs or {}))

    def per_layer(self):
        return {name: count / LAYERS for name, count in self.counts.items()}


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def gradients(model, ids, mask):
    """(logits, gradients of all parameters by name)."""
    logits = model(ids, attention_mask=mask, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return logits, {name: parameter.grad for name, parameter in model.named_parameters()}


def compare_gradients(model, ours, scan, ids, mask):
    logits, expected = gradients(model, ids, mask)
    with Calls() as calls:
        our_logits, actual = gradients(ours, ids, mask)
    close(our_logits, logits)
    assert actual.keys() == expected.keys()
    for name, grad in actual.items():
        close(grad, expected[name])
        assert expected[name].any()
    kernels = [f"{operator}_{kind}" for operator in ("causal_conv1d", scan) for kind in ("fwd", "bwd")]
    assert calls.per_layer() == dict.fromkeys(kernels, 1)


@pytest.mark.parametrize("masked", [False, True])
def test_logits_and_gradients(models, scan, tokens, masked):
    _, model, ours = models
    ids, mask = tokens
    compare_gradients(model, ours, scan, ids, mask if masked else None)


def test_training_mode(models, scan, tokens, monkeypatch):
    """A model in training mode calls mamba_inner_fn or mamba_split_conv1d_scan_combined, for which transformers has no
    plain torch of its own.

    With FalconMamba's norms the two differ by design: mamba_inner_fn norms delta after its projection, transformers'
    own path before it. So its own path is given the norm at that place here.
    """
    own, model, ours = models
    if hasattr(model.backbone.layers[0].mixer, "dt_layernorm"):
        own_scan, eps = own.mamba_selective_scan, model.config.mixer_rms_eps

        def scan_of_normed(u, delta, *args, **kwargs):
            return own_scan(u, delta * (delta.square().mean(1, keepdim=True) + eps).rsqrt(), *args, **kwargs)

        monkeypatch.setattr(own, "mamba_selective_scan", scan_of_normed)
        for layer in model.backbone.layers:
            layer.mixer.dt_layernorm.forward = lambda x: x
    compare_gradients(model.train(), ours.train(), scan, tokens[0], None)


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_cached_generation_token_by_token(models, scan, tokens, masked):
    """A prompt, then one token at a time: the same logits at every step from both, and from a pass over everything."""
    _, model, ours = models
    (ids, mask), prompt = tokens, 9
    mask = mask if masked else torch.ones_like(mask)
    whole = ours(ids, attention_mask=mask).logits
    caches = [None, None]
    for t in range(prompt - 1, L):
        step = {"input_ids": ids[:, t : t + 1]} if t >= prompt else {"input_ids": ids[:, :prompt]}
        step["attention_mask"] = None if t >= prompt else mask[:, :prompt]
        with Calls() as calls:
            out = ours(**step, cache_params=caches[0], use_cache=True)
        own = model(**step, cache_params=caches[1], use_cache=True)
        caches = [out.cache_params, own.cache_params]
        close(out.logits, own.logits)
        close(out.logits[:, -1], whole[:, t])
        kind = "step" if t >= prompt else "fwd"
        assert calls.per_layer() == {f"causal_conv1d_{kind}": 1, f"{scan}_{kind}": 1}


def test_generate(models, scan, tokens):
    _, model, ours = models
    ids, mask = tokens
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    with Calls() as calls:
        generated = ours.generate(ids, **options)
    assert torch.equal(generated, model.generate(ids, **options))
    assert calls.per_layer()[f"{scan}_step"] == 11


@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_bfloat16(models, tokens, training):
    """Everyone rounds in different places: both are about as far from float32."""
    pair = [model.train(training) for model in models[1:]]
    wide = [model(tokens[0]).logits for model in pair]
    half = [model.bfloat16()(tokens[0]).logits for model in pair]
    theirs, ours = ((h - w).abs().max() for h, w in zip(half, wide, strict=True))
    assert 0 < ours <= 2 * theirs


ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 32}
HYBRIDS = {  # the operator of their other layers, and their sizes
    "Jamba": (
        "selective_scan",
        {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_dt_rank": 3},
    ),
    "Zamba": (
        "selective_scan",
        {"num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 2, "mamba_dt_rank": 3}
        | {"attention_hidden_size": 48, "attention_head_dim": 12, "n_mamba_heads": 2},
    ),
    "Bamba": (
        "linear_attention",
        {"num_hidden_layers": 3, "attn_layer_indices": [1], "mamba_chunk_size": 8}
        | {"mamba_n_heads": 6, "mamba_d_head": 8, "mamba_n_groups": 2},
    ),
    "Zamba2": (
        "linear_attention",
        {"num_hidden_layers": 4, "layers_block_type": 2 * ["linear_attention", "hybrid"], "mamba_headdim": 8}
        | {
            "attention_hidden_size": 48,
            "attention_head_dim": 12,
            "n_mamba_heads": 6,
            "mamba_ngroups": 2,
            "chunk_size": 8,
        },
    ),
}


@pytest.mark.parametrize("name", HYBRIDS)
def test_layers_beside_attention(name, tokens):
    import transformers

    own = modeling(name.lower(), "own")
    with compat.installed(force=True):
        on_seqkern = modeling(name.lower(), "on_seqkern")
    scan, sizes = HYBRIDS[name]
    sizes = ATTENTION | sizes | {"vocab_size": VOCABULARY, "hidden_size": 24, "mamba_d_state": 5}
    config = getattr(transformers, f"{name}Config")(**sizes)
    model, ours = same_models(own, on_seqkern, f"{name}ForCausalLM", config)
    ids, mask = tokens
    logits, expected = gradients(model, ids, mask)
    with Calls() as calls:
        our_logits, actual = gradients(ours, ids, mask)
        close(our_logits, logits)
        for name, grad in actual.items():
            close(grad, expected[name])
        options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
        assert torch.equal(ours.generate(ids, **options), model.generate(ids, **options))
    assert {f"{scan}_{kind}" for kind in ("fwd", "bwd", "step")} <= calls.counts.keys()


EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
DELTA_RULES = {  # the module, the layers with a delta rule, and sizes
    "Qwen3Next": (
        "qwen3_next",
        3,
        {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6, "linear_value_head_dim": 5}
        | {"num_experts": 4, "shared_expert_intermediate_size": 16, "head_dim": 8},
    ),
    "KimiLinear": (
        "kimi_linear",
        3,
        {"linear_num_heads": 3, "linear_head_dim": 6, "num_local_experts": 4, "bos_token_id": 1}
        | {"layer_types": 3 * ["linear_attention"] + ["full_attention"]}
        | {"kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
    ),
}


@pytest.mark.parametrize("name", DELTA_RULES)
def test_delta_rules_beside_attention(name, tokens):
    """Every layer's rule is one call of seqkern forward, one backward, and a step for each cached token."""
    import transformers

    module, layers, sizes = DELTA_RULES[name]
    own = modeling(module, "own")
    with compat.installed(force=True):
        on_seqkern = modeling(module, "on_seqkern")
    sizes = ATTENTION | EXPERTS | sizes | {"vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 4}
    config = getattr(transformers, f"{name}Config")(**sizes, pad_token_id=0, eos_token_id=None)
    model, ours = same_models(own, on_seqkern, f"{name}ForCausalLM", config)
    ids, mask = tokens
    logits, expected = gradients(model, ids, mask)
    with Calls() as calls:
        our_logits, actual = gradients(ours, ids, mask)
    close(our_logits, logits)
    assert actual.keys() == expected.keys()
    for parameter, grad in actual.items():
        assert (grad is None) == (expected[parameter] is None)  # experts that no token chose
        if grad is not None:
            close(grad, expected[parameter])
    kernels = [f"{operator}_{kind}" for operator in ("causal_conv1d", "delta_rule") for kind in ("fwd", "bwd")]
    assert calls.counts == dict.fromkeys(kernels, layers)
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    options |= {"output_logits": True}
    with Calls() as calls:
        generated = ours.generate(ids, **options)
    theirs = model.generate(ids, **options)
    assert torch.equal(generated.sequences, theirs.sequences)
    close(torch.stack(generated.logits), torch.stack(theirs.logits))
    assert calls.counts["delta_rule_fwd"] == layers and calls.counts["delta_rule_step"] == 5 * layers
    assert calls.counts["causal_conv1d_step"] == 5 * layers
