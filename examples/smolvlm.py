"""SmolVLM describes a photo, token by token: python examples/smolvlm.py PHOTO [MODEL].

The first run fetches about 0.5 GB from the Hugging Face hub.
"""

import sys

import mlxvlm

if len(sys.argv) < 2:
    sys.exit(__doc__)
model = sys.argv[2] if len(sys.argv) > 2 else "HuggingFaceTB/SmolVLM-256M-Instruct"

with mlxvlm.load(model, progress=lambda done, total: None) as engine:
    sampling = mlxvlm.SamplingParams(max_tokens=300)
    request = mlxvlm.Request([mlxvlm.user("Describe this photo.", [sys.argv[1]])], sampling)
    for delta in engine.submit(request):
        print(delta.text, end="", flush=True)
    print()
