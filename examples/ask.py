"""Ask the demo model about a picture: python examples/ask.py [PICTURE] [QUESTION]."""

import sys
from pathlib import Path

import mlxvlm

picture = (
    sys.argv[1]
    if len(sys.argv) > 1
    else Path(__file__).parent / "pictures" / "orange-heart-red-star-black-triangle.png"
)
question = sys.argv[2] if len(sys.argv) > 2 else "What is in this picture?"

with mlxvlm.load("demo") as engine:
    answer = engine.generate(mlxvlm.Request([mlxvlm.user(question, [picture])]))
    print(answer.text.strip())
    print(f"{answer.usage.completion_tokens} tokens, {answer.usage.completion_tokens_per_s:.0f} a second")
