"""HPSv3++: the successor of HPSv3 over Qwen3-VL, whose head is conditioned on how able a generator is and how far its training has come."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import attrs
import torch
from torch import Tensor, nn

from diffalign.core import ConfigError, Progress, Prompt, Reward, StepReward
from diffalign.core.words import allowed_word
from diffalign.placement import is_there, placed

from .marked_text import PIXELS, MarkedText, rank_head
from .pixels import check_batch, normalized, resized
from .qwen2_vl import patches, working_size
from .qwen3_vl import MERGED, PATCH, counted, multiples, qwen3_vl, require_qwen3_vl
from .weights import every, fill, locate, parted, read_tensors

_HALF = (0.5, 0.5, 0.5)

_SHARE = attrs.validators.and_(attrs.validators.ge(0.0), attrs.validators.le(1.0))


@attrs.define(eq=False)
class HPSv3PlusPlus(Reward):
    """Preference of people between images (HPSv3++), learned by Qwen3-VL-8B on generators of all abilities and on their training by RL.

        reward = mu,   (mu, sigma) = head((1 + gamma) h + beta),   (gamma, beta) = FiLM(c, iteration)
        c = sigmoid(w . (W h + b) + a),   h = last hidden state at the token <|Reward|>, behind picture, instruction and prompt

    FiLM is linear layers 2-256-256 with GELU between them, then 256-D-2D with ReLU; the head is linear layers D-1024-16-2 with ReLU; all of
    it is float32 (theirs has c in bfloat16). c in [0, 1] stands for the ability of the generator. The authors' code pools it over the
    images that it is called with; here each image has its own, as their code gives for one image at a time, so that a score does not
    depend on others.

    `iteration` says how far a training by RL has come, if the images are from one. The authors take 0 to rank images and to compare models,
    and 0.3 to 1, linearly over the run, for a reward in training: `IterationRamp` does that. Pictures are resized as for `HPSv3`, about
    448 x 448 in multiples of 28, and again to the nearest multiples of 32, because the authors' code does both. There is no system message;
    tokens of the picture are counted by rows and columns. The instruction is that of the authors' code (templates/hpsv3_plus_plus.txt):
    HPSv3's without its second part (HPSv3 Team, MIT). Scale: not stated. Licence: Apache-2.0. 17.6 GB. transformers 4.57 or newer.

    All this follows the authors' public code. Their file was not read: names and shapes are those that their code and Qwen3-VL-8B give.

    Args:
        weights: the authors' checkpoint: a file, a folder or a hub id that holds `file`
        file: its name there
        tokenizer: tokenizer of Qwen3-VL, a hub id or a local folder
        iteration: progress of the training by RL from which the images come, from 0 to 1
        batch: images that pass at once
        dtype: type of the model's weights; what conditions and the head are float32
        device: device of the model; None takes that of the images

    Raises:
        ConfigError: the weights cannot be found, or are those of another network; transformers has no Qwen3-VL.
        ValueError: (of a call) a prompt that holds a token of the model's own, such as <|Reward|>; sides more unequal than 1 to 200.

    Reference: Liu et al., arXiv:2606.14657.
    """

    weights: str = "Junjun2333/HPSv3-PlusPlus"
    file: str = "hpsv3++.pth"
    tokenizer: str = "Qwen/Qwen3-VL-8B-Instruct"
    iteration: float = attrs.field(default=0.0, validator=_SHARE)
    batch: int = attrs.field(default=8, validator=attrs.validators.ge(1))
    dtype: Literal["bfloat16", "float32"] = attrs.field(default="bfloat16", validator=allowed_word)
    device: str | None = attrs.field(default=None, validator=is_there)
    _text: MarkedText = attrs.field(init=False, repr=False)
    _network: nn.ModuleDict = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        require_qwen3_vl("HPSv3PlusPlus")
        self._text, file = every(
            lambda: MarkedText.load("HPSv3PlusPlus", self.tokenizer, "hpsv3_plus_plus.txt"),
            lambda: locate(self.weights, self.file, "HPSv3PlusPlus.weights"),
        )
        where = "HPSv3PlusPlus.weights"
        self._network = hpsv3_plus_plus_network(read_tensors(file, where), where, getattr(torch, self.dtype), self._text.image)
        reader: Any = self._network["reader"]
        self._text.require_within(reader.get_input_embeddings().weight.shape[0])

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return self.at_iteration(images, prompts, self.iteration)

    @torch.no_grad()
    def at_iteration(self, images: Tensor, prompts: Sequence[Prompt], iteration: float) -> Tensor:
        """Score images [K, 3, H, W] in [0, 1] with their K prompts at another iteration, from 0 to 1: [K]."""
        check_batch("HPSv3PlusPlus", images, prompts)
        first = working_size(images.shape[-2], images.shape[-1], PIXELS)
        size = multiples(*first)
        texts = [self._text.text(prompt, size[0] // MERGED * (size[1] // MERGED)) for prompt in prompts]
        device = images.device if self.device is None else placed(self.device)
        network = self._network.to(device)
        marks = []
        for start in range(0, len(images), self.batch):
            part = slice(start, start + self.batch)
            shown = resized(resized(images[part].to(device, torch.float32), *first), *size)
            ids, mask = self._text.tokens(texts[part], device)
            flat, grid = patches(normalized(shown, _HALF, _HALF), PATCH)
            read = network["reader"](
                input_ids=ids,
                attention_mask=mask,
                position_ids=counted(ids, self._text.image, size[0] // MERGED, size[1] // MERGED),
                pixel_values=flat,
                image_grid_thw=grid,
            )
            marks.append(network["head"](self._text.at_mark(read.last_hidden_state, ids), iteration)[:, 0])
        return torch.cat(marks)


@attrs.frozen(eq=False)
class IterationRamp(StepReward):
    """HPSv3++ as a reward in training: its iteration rises linearly over the run.

        iteration = start + (end - start) p,   p = share of the run that is done

    Elsewhere than in a training step, in an evaluation for instance, the iteration is that of the reward itself, so that the scores of a
    curve are comparable.

    Args:
        reward: the reward
        start: iteration at the first step
        end: iteration at the last step

    Reference: Liu et al., arXiv:2606.14657, who train from 0.3 to 1.
    """

    whole: ClassVar[bool] = False

    reward: HPSv3PlusPlus
    start: float = attrs.field(default=0.3, validator=_SHARE)
    end: float = attrs.field(default=1.0, validator=_SHARE)

    def of_step(self, images: Tensor, prompts: Sequence[Prompt], group: Tensor, progress: Progress) -> Tensor:
        del group
        return self.reward.at_iteration(images, prompts, self.start + (self.end - self.start) * progress.fraction)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return self.reward(images, prompts)


class ConditionedHead(nn.Module):
    """Head of a checkpoint of HPSv3++, without dropout; all its tensors become float32.

    Args:
        tensors: rm_head.*, cond_encoder.*, film_gen.* and cap_encoder.*
        where: for messages

    Raises:
        ConfigError: names or shapes do not fit.
    """

    def __init__(self, tensors: Mapping[str, Tensor], where: str) -> None:
        super().__init__()
        head, others = parted(tensors, "rm_head.")
        own = {name: tensor.float() for name, tensor in others.items()}
        rank = rank_head(head, where, "HPSv3++")
        try:
            inside, width = own["cap_encoder.proj.weight"].shape
        except (KeyError, ValueError) as error:
            raise ConfigError(f"{where} must hold cap_encoder.proj; it is no checkpoint of HPSv3++") from error
        with torch.device("meta"):
            self.cap_encoder = nn.ModuleDict(
                {
                    "proj": nn.Linear(width, inside),
                    "pool_attn": nn.Linear(inside, 1),  # weighs the images of a group; the weight of one alone is 1, whatever this says
                    "out_proj": nn.Linear(inside, 1),
                }
            )
            self.cond_encoder = nn.Sequential(nn.Linear(2, inside), nn.GELU(), nn.Linear(inside, inside))
            self.film_gen = nn.Sequential(nn.Linear(inside, width), nn.ReLU(), nn.Linear(width, 2 * width))
        fill(self, own, f"{where} (head)")
        self.rm_head = rank

    def forward(self, hidden: Tensor, iteration: float) -> Tensor:
        """Mean and deviation of the preference for hidden states [B, D]: [B, 2]."""
        ability = torch.sigmoid(self.cap_encoder["out_proj"](self.cap_encoder["proj"](hidden)))
        condition = torch.cat([ability, torch.full_like(ability, iteration)], dim=1)
        gamma, beta = self.film_gen(self.cond_encoder(condition)).chunk(2, dim=1)
        marks: Tensor = self.rm_head((1 + gamma) * hidden + beta)
        return marks


def hpsv3_plus_plus_network(tensors: Mapping[str, Tensor], where: str, dtype: torch.dtype, image: int) -> nn.ModuleDict:
    """Qwen3-VL ("reader") of a checkpoint of HPSv3++ in a dtype, and its conditioned "head" in float32, in eval mode.

    Args:
        tensors: model.* of Qwen3-VL, and those of the head
        where: for messages
        dtype: type of the weights of Qwen3-VL
        image: number of the token whose places the picture takes

    Raises:
        ConfigError: names or shapes do not fit.
    """
    own, others = parted(tensors, "model.")
    _, head = parted(others, "lm_head.")  # of the model that writes
    marking = ConditionedHead(head, where)
    return nn.ModuleDict({"reader": qwen3_vl(own, f"{where} (model)", dtype, image), "head": marking}).requires_grad_(False).eval()
