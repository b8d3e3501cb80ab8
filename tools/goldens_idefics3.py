"""Writes the Idefics3 and SmolVLM checkpoints, in the layouts of model repositories, and loads them."""

from __future__ import annotations

import math
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from goldens_idefics3_cases import CASES, END, FAKE, IMAGE, Case, Json
from goldens_json import read_json, write_json
from goldens_reference import fill_parameters, save_loaded, share_weights
from goldens_tokens import token_id, train
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    SmolVLMProcessor,
)

__all__ = ["CASES", "build", "load_processor", "resave", "share_weights"]

# Like the families' own templates: no space after the colon when the first part is an image.
TEMPLATE = (
    "{% for message in messages %}{{ message['role'].capitalize() }}:"
    "{% if message['content'][0]['type'] != 'image' %} {% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def build(case: Case, seed: int, folder: Path) -> None:
    """Writes the whole checkpoint as model repositories of 2024 and 2025 have it."""
    tokenizer = train(case.tokens)
    write_tokenizer(case, tokenizer, folder)
    write_config(case, tokenizer, folder)
    write_processor(case, folder)
    write_weights(case, seed, tokenizer, folder)


def write_tokenizer(case: Case, tokenizer: Tokenizer, folder: Path) -> None:
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    named = {"bos_token": case.tokens.bos, "eos_token": case.eos[-1], "pad_token": case.pad}
    if case.unk:
        named["unk_token"] = case.unk
    extra = [FAKE, IMAGE, END]
    decoder = {
        str(number): {"content": token.content, **plain, "special": True}
        for number, token in tokenizer.get_added_tokens_decoder().items()
    }
    settings = {
        **({"added_tokens_decoder": decoder} if case.tokens.style == "llama3" else {}),
        "additional_special_tokens": extra,
        **named,
        "clean_up_tokenization_spaces": False,
        "model_max_length": case.config["text_config"]["max_position_embeddings"],
        "tokenizer_class": case.tokenizer_class,
    }
    if "tokenizer_config.json" in case.template_files:
        settings["chat_template"] = template(case)
    write_json(folder / "tokenizer_config.json", settings, compact_below=1)
    special: Json = {key: {"content": token, **plain} for key, token in named.items()}
    special["additional_special_tokens"] = extra
    write_json(folder / "special_tokens_map.json", special, compact_below=0)


def template(case: Case) -> str:
    return case.tokens.bos + TEMPLATE


def write_config(case: Case, tokenizer: Tokenizer, folder: Path) -> None:
    rows = tokenizer.get_vocab_size() + case.spare_rows
    pad, dtype = token_id(tokenizer, case.pad), str(case.dtype).removeprefix("torch.")
    ends = [token_id(tokenizer, token) for token in case.eos]
    text = {
        **case.config["text_config"],
        "bos_token_id": token_id(tokenizer, case.tokens.bos),
        # As published: the chat's own end of turn is missing here, generation_config.json has it.
        "eos_token_id": ends[:-1] or pad,
        "pad_token_id": pad,
        "torch_dtype": dtype,
        "vocab_size": rows,
    }
    root = {
        **case.config,
        "image_token_id": token_id(tokenizer, IMAGE),
        "text_config": dict(sorted(text.items())),
        "torch_dtype": dtype,
        "vocab_size": rows,
        **case.extra,
    }
    write_json(folder / "config.json", dict(sorted(root.items())), compact_below=2)
    generation = {
        "_from_model_config": True,
        "bos_token_id": text["bos_token_id"],
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        "pad_token_id": pad,
        "transformers_version": "4.46.0",
    }
    write_json(folder / "generation_config.json", generation)


def write_processor(case: Case, folder: Path) -> None:
    kind = case.config["architectures"][0].removesuffix("ForConditionalGeneration")
    vision = case.config["vision_config"]
    side = vision["image_size"] // vision["patch_size"] // case.config["scale_factor"]
    image = {
        "do_convert_rgb": True,
        "do_image_splitting": case.splitting,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": f"{kind}ImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "max_image_size": {"longest_edge": case.tile},
        "processor_class": f"{kind}Processor",
        "resample": 1,
        "rescale_factor": 0.00392156862745098,
        "size": {"longest_edge": case.longest_edge},
    }
    write_json(folder / "preprocessor_config.json", image)
    whole = {"image_seq_len": side * side, "processor_class": f"{kind}Processor"}
    write_json(folder / "processor_config.json", whole)
    if "chat_template.json" in case.template_files:
        write_json(folder / "chat_template.json", {"chat_template": template(case)})
    if "chat_template.jinja" in case.template_files:
        (folder / "chat_template.jinja").write_text(template(case), encoding="utf-8")


def parameter_scale(tied: bool) -> Any:
    """Deviations that give logits a spread of 3 to 5 and make every part matter for them.

    Sharper attention (a q and k gain of 2) would also blow float32 noise up to 5e-5; so it is near 1e-5.
    """

    def scale(name: str, shape: torch.Size) -> float:
        if "norm" in name or name.endswith("bias"):
            return 0.1
        if "position_embedding" in name:
            return 0.8
        if "embed_tokens" in name:
            return 1.4 / math.sqrt(shape[1]) if tied else 1.0
        gains = {"lm_head": 1.4, "q_proj": 1.3, "k_proj": 1.3, "patch_embedding": 2.0}
        if tied:  # else the stream stays so near to the last token that its row wins again and again
            gains |= {"text_model.layers.0.mlp.down_proj": 3.0, "text_model.layers.1.self_attn.o_proj": 2.0}
        gain = next((gain for part, gain in gains.items() if part in name), 1.0)
        return gain / math.sqrt(math.prod(shape[1:]))

    return scale


def write_weights(case: Case, seed: int, tokenizer: Tokenizer, folder: Path) -> None:
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    fill_parameters(model, seed, parameter_scale(case.config["tie_word_embeddings"]))
    never = [token_id(tokenizer, token) for token in (IMAGE, FAKE, case.pad)]
    never += range(tokenizer.get_vocab_size(), model.lm_head.weight.shape[0])
    with torch.no_grad():
        model.lm_head.weight[never] = 0.0  # a logit of 0 is never the largest: these are not generated
    with tempfile.TemporaryDirectory() as temporary:
        first, second = Path(temporary, "first"), Path(temporary, "second")
        model.to(case.dtype).save_pretrained(first)
        save_loaded(case, first, second)
        for path in second.glob("*.safetensors"):
            shutil.copyfile(path, folder / path.name)
        for path in second.glob("*.index.json"):
            write_json(folder / path.name, read_json(path), compact_below=1)


class ImageOnlySmolVLMProcessor(SmolVLMProcessor):
    """Without torchvision there is no video processor; pictures need none."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        if argument_name == "video_processor":
            return type(argument)
        return super().check_argument_for_proper_class(argument_name, argument)


def load_processor(folder: Path) -> Any:
    image = AutoImageProcessor.from_pretrained(folder, backend="pil")
    if read_json(folder / "config.json")["model_type"] != "smolvlm":
        processor = AutoProcessor.from_pretrained(folder)
        processor.image_processor = image
        return processor
    return ImageOnlySmolVLMProcessor(
        image,
        AutoTokenizer.from_pretrained(folder),
        SimpleNamespace(num_frames=1, fps=1),
        image_seq_len=read_json(folder / "processor_config.json")["image_seq_len"],
        chat_template=(folder / "chat_template.jinja").read_text(encoding="utf-8"),
    )


def resave(case: Case, source: Path, folder: Path) -> None:
    """The same model and processor as transformers 5 writes them today."""
    save_loaded(case, source, folder)
    load_processor(source).save_pretrained(folder)
