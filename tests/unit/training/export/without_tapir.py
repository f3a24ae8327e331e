"""Loads exports by `transformers` alone: `python -S without_tapir.py JOBS.json OUT.safetensors`.

Without `site` the packages beside this Python can be imported, but not Tapir, which is installed
in place. A job is a folder, captions or ids, a seed, and how many candidates.
"""

import contextlib
import json
import sys
from importlib.util import find_spec
from typing import Any

sys.modules["torchvision"] = None  # type: ignore[assignment]  # registries have it for CUDA alone
TAPIR = json.loads(sys.argv[3])


def main(jobs: dict[str, Any], out: str) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModel, AutoTokenizer, TopKLogitsWarper

    drawn: dict[str, torch.Tensor] = {}
    for name, job in jobs.items():
        folder, captions, count = job["folder"], job["captions"], job["candidates"]
        model = AutoModel.from_pretrained(folder, trust_remote_code=True)
        if captions is None:
            drawn[f"{name}.pictures"] = model.pictures(torch.tensor(job["codes"], device="cpu"))
            continue
        if "ids" in job:
            text = torch.tensor(job["ids"], device="cpu").repeat_interleave(count, 0)
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder, subfolder="tokenizer")
            text = model.text_ids(tokenizer, captions, count)

        def codes(ids: Any, noise: Any = (), model: Any = model) -> torch.Tensor:
            return model.generate(ids, logits_processor=list(noise))[:, model.text_length :]

        noise = model.keyed_noise(captions, count, seed=job["seed"])
        cool = model.keyed_noise(captions, count, seed=job["seed"], temperature=0.5)
        drawn[f"{name}.greedy"] = codes(text)
        drawn[f"{name}.keyed"] = codes(text, [noise])
        drawn[f"{name}.top_k"] = codes(text, [TopKLogitsWarper(3), cool])
        prompt = drawn[f"{name}.greedy"][:, : job["kept"]]
        drawn[f"{name}.prompt"] = codes(torch.cat([text, prompt], 1), [noise])
        with contextlib.suppress(ValueError):
            model.generate(text, max_new_tokens=model.image_length + 1)
            raise AssertionError("more codes than a picture has")
        if model.config.dvae:
            pictures = model.pictures(drawn[f"{name}.keyed"])
            drawn[f"{name}.pictures"] = pictures
            drawn[f"{name}.codes"] = model.encode(pictures)
            half = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
            drawn[f"{name}.half"] = half.pictures(codes(text, [noise], half))
    save_file({name: value.contiguous() for name, value in drawn.items()}, out)


if __name__ == "__main__":
    assert not [name for name in TAPIR if find_spec(name)], "Tapir can be imported here"
    with open(sys.argv[1]) as file:
        main(json.load(file), sys.argv[2])
