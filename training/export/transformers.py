"""Files by which `transformers` loads an exported folder, in a process without Tapir.

    config.json                   sizes of prior and dVAE, and the classes to load them with
    generation_config.json        the length of a prior's stream
    model.safetensors.index.json  all weights, in the files of prior/ and dvae/
    modeling_tapir.py, ...        copies of custom_code/

CLIP is not among them, nor an image tokenizer of another project; guidance is refused there.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoint.tensors import Shapes
from core.config import from_json, to_json
from core.files.atomic import Json, canonical_json, write_atomic
from core.log import LOG
from models.config import DVAEConfig, PriorConfig
from training.export.files import CONFIG, write_index
from training.export.weights import KINDS, TOKENIZER, Weights

SIZES: dict[str, type[Any]] = {"prior": PriorConfig, "dvae": DVAEConfig}
"""The stages that custom_code knows, and their sizes."""
GENERATION, TOKENIZER_CONFIG = "generation_config.json", "tokenizer_config.json"
_CODE = Path(__file__).with_name("custom_code")
_MODULE = "modeling_tapir"


def write_transformers(
    folder: Path, models: Mapping[str, Weights], cuts: Mapping[str, Mapping[str, list[str]]]
) -> None:
    """Write these files into an exported folder; none if it has neither a prior nor a dVAE.

    `cuts`: by model, the tensors of each of its files.
    """
    known = {stage: model for stage, model in models.items() if model.stage in SIZES}
    if not known:
        return
    configs = {stage: from_json(SIZES[stage], model.config) for stage, model in known.items()}
    body: Json = {
        "model_type": "tapir",
        "architectures": ["TapirModel"],
        "auto_map": {
            "AutoConfig": f"{_MODULE}.TapirConfig",
            "AutoModel": f"{_MODULE}.TapirModel",
        },
        "dtype": "float32",
        **{stage: to_json(config) for stage, config in configs.items()},
    }
    write_atomic(folder / CONFIG, canonical_json(body))
    if "prior" in configs:
        generation = {"do_sample": False, "max_length": configs["prior"].length}
        write_atomic(folder / GENERATION, canonical_json(generation))
    files = {f"{stage}/{file}": cuts[stage][file] for stage in known for file in cuts[stage]}
    shapes = {name: shape for m in known.values() for name, shape in own_shapes(m).items()}
    write_index(folder, files, shapes)
    for path in code_files():
        write_atomic(folder / path.name, path.read_bytes())
    if any(model.stage == TOKENIZER for model in models.values()):
        LOG.info(
            "transformers loads the prior, which draws codes; the image tokenizer of another "
            "project that decodes them is loaded by `tapir import` alone"
        )


def loads_elsewhere(models: Mapping[str, Weights]) -> bool:
    """True if `transformers` can load one of the models."""
    return any(model.stage in SIZES for model in models.values())


def own_shapes(model: Weights) -> Shapes:
    """Shapes by the names of a network's parameters."""
    prefix = KINDS[model.stage].prefix
    return {name.removeprefix(prefix): shape for name, shape in model.shapes.items()}


def code_files() -> list[Path]:
    """The Python files that are copied."""
    return sorted(_CODE.glob("*_tapir.py"))


def tokenizer_config() -> bytes:
    """What lets `AutoTokenizer` load tokenizer.json beside it as it is."""
    body = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    return canonical_json(body)
