"""Captions for a folder of pictures: python examples/python/caption_folder.py FOLDER --model Qwen/Qwen2-VL-2B-Instruct.

Lines of JSON, one a picture, are added to the output; run it again to go on where it was stopped.
"""

import argparse
import json
from pathlib import Path

from tqdm import tqdm

import mlxvlm

ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent.parent / "pictures")
parser.add_argument("--model", default="demo")
parser.add_argument("--prompt", default="What do you see?")
parser.add_argument("--output", type=Path, default=Path("captions.jsonl"))
args = parser.parse_args()

done = {json.loads(line)["file"] for line in args.output.read_text().splitlines()} if args.output.exists() else set()
pictures = sorted(path for path in args.folder.rglob("*") if path.suffix.lower() in ENDINGS)
waiting = [path for path in pictures if str(path) not in done]

with mlxvlm.load(args.model) as engine, args.output.open("a") as output:
    questions = (mlxvlm.user(args.prompt, [path]) for path in waiting)
    answers = engine.batch(questions, return_errors=True, max_tokens=200)
    for path, answer in zip(waiting, tqdm(answers, total=len(waiting), unit="picture"), strict=True):
        if isinstance(answer, mlxvlm.MlxvlmError):
            tqdm.write(f"{path}: {answer}")  # not in the output, so tried again next time
            continue
        print(json.dumps({"file": str(path), "caption": answer.text.strip()}), file=output, flush=True)
print(f"{args.output}: {len(pictures)} pictures, {len(waiting)} of them now")
