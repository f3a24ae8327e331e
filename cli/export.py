"""The verbs export and import."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from core.errors import InputError
from core.flags import PositionalPath, parse
from core.log import LOG
from training.export.huggingface import INDEX, export_parts, find_parts, import_parts
from training.export.openai_dvae import export_dvae, import_dvae
from training.export.weights import model_is_whole


def export(arguments: list[str]) -> None:
    """`tapir export RUNS OUT`."""

    def run(
        runs: PositionalPath,
        out: PositionalPath,
        to: Literal["huggingface", "openai-dvae"] = "huggingface",
        prior: Path | None = None,
        dvae: Path | None = None,
        clip: Path | None = None,
        bpe: Path | None = None,
        shard_gigabytes: float = 5.0,
    ) -> None:
        """Write trained models as safetensors + JSON for others; `tapir import` reads them back.

        huggingface: dVAE, prior, CLIP and tokenizer in one folder, as on the Hugging Face hub, with
        a model card. An unfinished run gives its newest checkpoint. openai-dvae: a
        dVAE in the layout of OpenAI's public dall_e package, as encoder.safetensors and
        decoder.safetensors; it must have 4 groups, bottleneck 4 and the paper's gain.

        Args:
            runs: a run folder, or the folder above the run folders dvae, prior, clip and bpe
            out: folder to write; for huggingface it must be empty or new
            to: the layout
            prior: run folder of the prior, if it is elsewhere
            dvae: run folder of the dVAE, if it is elsewhere
            clip: run folder of the CLIP, if it is elsewhere
            bpe: folder of tokenizer.json, if it is elsewhere
            shard_gigabytes: larger weights are cut into files of at most this size
        """
        if to == "openai-dvae":
            for path in export_dvae(dvae or runs, out):
                LOG.info("wrote %s", path)
            return
        if not shard_gigabytes > 0:
            raise InputError("--shard-gigabytes must be above 0; the hub's is 5")
        parts = find_parts(runs, {"prior": prior, "dvae": dvae, "clip": clip, "bpe": bpe})
        export_parts(parts, out, int(shard_gigabytes * 10**9))
        LOG.info("wrote %s", out)

    parse(run, arguments, "export")


def import_(arguments: list[str]) -> None:
    """`tapir import FOLDER OUT`."""

    def run(
        folder: PositionalPath,
        out: PositionalPath,
        layout: Annotated[
            Literal["auto", "huggingface", "openai-dvae"], tyro.conf.arg(name="from")
        ] = "auto",
        pixels: int = 256,
    ) -> None:
        """Turn exported models into finished run folders, with the same digests.

        Args:
            folder: what `tapir export` wrote; or a dVAE of OpenAI's dall_e package as
                encoder.safetensors and decoder.safetensors (no pickles)
            out: new folder for the run folders prior, dvae, clip and bpe; for OpenAI's layout, the
                run folder for `tapir tokenize --dvae`
            layout: the layout; auto looks at the files
            pixels: for OpenAI's layout: side of the square pictures to encode
        """
        hub = (folder / INDEX).is_file() if layout == "auto" else layout == "huggingface"
        if hub:
            LOG.info("%s: %s", out, ", ".join(import_parts(folder, out)))
            return
        if model_is_whole(out, "dvae"):
            raise InputError(f"{out} holds a finished dVAE already; give another folder")
        config = import_dvae(folder, out, pixels)
        LOG.info("%d codes on a grid of %d: %s", config.codebook, config.grid, out)

    parse(run, arguments, "import")
