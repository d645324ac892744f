"""Gives the tensors of a few-step student their names back, so that `lora.start` of a run file can read it.

python examples/student_from_list.py PIPELINE LIST FOLDER [--rank 32] [--alpha 64] [--targets ...]

TDM's and TDM-R1's authors publish students as the moving average of a training state: a list of tensors in the order in which the adapters
of their network were made. Their adapters are made again here, filled in that order, and written to FOLDER as diffusers names them. Rank,
alpha and targets must be those of the training; the defaults are those of the published students of Stable Diffusion 3.5 and Z-Image.
A list of another length or of other shapes is refused; an exchange of tensors of equal shape could not be seen, so look at samples.
"""

import argparse

import torch
from diffusers import DiffusionPipeline

from diffalign.policies import FlowMatchingPolicy, LoRA

JOINT = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
TARGETS = {
    "StableDiffusion3Pipeline": tuple(f"attn.{layer}" for layer in JOINT),
    "ZImagePipeline": tuple(f"attention.{layer}" for layer in JOINT[:4]),
}


def targets_of(pipeline: str) -> tuple[str, ...]:
    """The layers that the published student of this kind of pipeline adapts."""
    kind = DiffusionPipeline.load_config(pipeline)["_class_name"]
    if kind not in TARGETS:
        raise SystemExit(f"--targets must be given for a {kind}; students of {' and '.join(TARGETS)} are known")
    return TARGETS[kind]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", help="folder or hub id of the base")
    parser.add_argument("list", help="what torch.save wrote, with the list under --key")
    parser.add_argument("folder", help="for pytorch_lora_weights.safetensors")
    parser.add_argument("--key", default="ema_parameters")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--alpha", type=int, default=64)
    parser.add_argument("--targets", nargs="+", help="ends of the names of the adapted layers; by default the published student's")
    arguments = parser.parse_args()
    tensors = torch.load(arguments.list, map_location="cpu", weights_only=True)[arguments.key]
    lora = LoRA(rank=arguments.rank, alpha=arguments.alpha, targets=arguments.targets or targets_of(arguments.pipeline))
    policy = FlowMatchingPolicy.from_pretrained(arguments.pipeline, lora=lora, dtype="bfloat16", device="cpu")
    mine = policy.own_parameters()
    if [tensor.shape for tensor in tensors] != [parameter.shape for parameter in mine.values()]:
        raise SystemExit(
            f"{arguments.list} must hold the {len(mine)} tensors of adapters of rank {arguments.rank}, in the order of the layers; it has "
            f"{len(tensors)}, and not all of the same shapes. Rank and targets must be those of the training."
        )
    with torch.no_grad():
        for parameter, tensor in zip(mine.values(), tensors, strict=True):
            parameter.copy_(tensor)
    policy.save_lora(arguments.folder)
    print(f"{len(tensors)} tensors, now with names, in {arguments.folder}")


if __name__ == "__main__":
    main()
