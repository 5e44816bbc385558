"""Gradients of MoE blocks by PyTorch's autograd, from the model's own code.

For each family below, adds `gradients.safetensors` to its folder of golden data, which already has the weights
(`model.safetensors`), the configuration and the inputs. The block runs in f64 on the CPU, eager experts, on `input.0`; the
loss is `sum(d_y * y)` with d_y drawn once from a seeded normal distribution. All is stored in f32:

    d_y             [T, H]  the gradient that comes in (f32 exactly)
    d_x             [T, H]  the gradient of input.0
    aux_loss, d_logits      (mixtral alone) transformers' load-balancing loss of the block's logits and its gradient [T, E]
    every name of model.safetensors: the gradient of that tensor, in its own layout; zeros for buffers, which have none

Run with torch and transformers from a virtual environment outside of the repository:

    python scripts/gradient_goldens.py crates/fused-moe/tests/goldens
"""

import importlib
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

FAMILIES = {
    "mixtral": "MixtralSparseMoeBlock",
    "qwen2_moe": "Qwen2MoeSparseMoeBlock",
    "deepseek_v3": "DeepseekV3MoE",
    "gpt_oss": "GptOssMLP",
}


def parts(name):
    """What a published name stands for: a parameter of the block, and the expert and rows of it."""
    name = name.split(".", 4)[4]  # without model.layers.N and the name of the block
    words = name.split(".")
    if words[0] == "experts" and words[1].isdigit():
        kind = {"w1": "gate", "gate_proj": "gate", "w3": "up", "up_proj": "up", "w2": "down", "down_proj": "down"}
        kind = kind[words[2]]
        return ("experts.down_proj" if kind == "down" else "experts.gate_up_proj", int(words[1]), kind)
    return (name, None, None)


def slot(tensor, expert, kind):
    """The window on a parameter that a published tensor is."""
    if expert is None:
        return tensor
    tensor = tensor[expert]
    half = tensor.shape[0] // 2
    return {"gate": tensor[:half], "up": tensor[half:], "down": tensor}[kind]


def gradients(folder, family):
    config = AutoConfig.from_pretrained(folder)
    config._experts_implementation = "eager"
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    block = getattr(module, FAMILIES[family])(config).double()
    state = dict(block.named_parameters()) | dict(block.named_buffers())
    published = load_file(folder / "model.safetensors")
    with torch.no_grad():
        for name, tensor in published.items():
            target, expert, kind = parts(name)
            slot(state[target], expert, kind).copy_(tensor)
    x = load_file(folder / "golden.safetensors")["input.0"].double().requires_grad_()
    torch.manual_seed(7)
    d_y = torch.randn(x.shape, dtype=torch.float32)
    output = block(x)
    y = output[0] if isinstance(output, tuple) else output
    expected = load_file(folder / "golden.safetensors")["output_f64.0"].reshape(y.shape)
    off = ((y - expected).abs().max() / expected.abs().max()).item()
    assert off < 1e-6, f"{family}: the block is not what the golden data were made of: {off}"
    (y * d_y.double()).sum().backward()
    out = {"d_y": d_y.reshape(-1, x.shape[-1]), "d_x": x.grad.reshape(-1, x.shape[-1])}
    for name, tensor in published.items():
        target, expert, kind = parts(name)
        grad = state[target].grad
        out[name] = torch.zeros_like(tensor) if grad is None else slot(grad, expert, kind)
    if family == "mixtral":
        logits = block.gate(x.detach())[0].detach().requires_grad_()
        loss = module.load_balancing_loss_func((logits,), config.num_local_experts, config.num_experts_per_tok)
        loss.backward()
        out |= {"aux_loss": loss.detach().reshape(1), "d_logits": logits.grad}
    return {name: tensor.detach().to(torch.float32).contiguous().clone() for name, tensor in out.items()}


def main():
    root = Path(sys.argv[1])
    for family in FAMILIES:
        tensors = gradients(root / family, family)
        save_file(tensors, root / family / "gradients.safetensors")
        size = (root / family / "gradients.safetensors").stat().st_size
        largest = max(tensor.abs().max().item() for tensor in tensors.values())
        print(f"{family}: {len(tensors)} tensors, {size} bytes, largest {largest:.3}")
    versions = {"torch": torch.__version__}
    versions["transformers"] = importlib.import_module("transformers").__version__
    print(json.dumps(versions))


if __name__ == "__main__":
    main()
