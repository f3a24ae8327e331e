"""The verbs export and import."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from core.config import check
from core.flags import PositionalPath, parse
from core.log import LOG
from models.tokenizers.config import ReadOptions
from training.export.huggingface import (
    INDEX,
    digests_of,
    export_parts,
    find_parts,
    import_parts,
)
from training.export.openai_dvae import PARTS, export_dvae, import_dvae
from training.export.push import check_repository, holds_already, listing
from training.export.push import push as push_folder
from training.export.tokenizers import import_tokenizer

HUB, OPENAI = "huggingface", "openai-dvae"


def export(arguments: list[str]) -> None:
    """`tapir export RUNS OUT`."""
    parse(_export, arguments, "export")


def _export(
    runs: PositionalPath,
    out: PositionalPath,
    to: Literal["huggingface", "openai-dvae"] = "huggingface",
    prior: Path | None = None,
    dvae: Path | None = None,
    clip: Path | None = None,
    bpe: Path | None = None,
    shard_gigabytes: float = 5.0,
    push: str = "",
    private: bool = False,
    dry_run: bool = False,
) -> None:
    """Write trained models as safetensors + JSON for others; `tapir import` reads them back.

    huggingface: dVAE, prior, CLIP and tokenizer in one folder, as on the Hugging Face hub, with a
    model card; `transformers` loads prior and dVAE from it without Tapir. An unfinished run gives
    its newest checkpoint. openai-dvae: a dVAE in the layout of OpenAI's public dall_e package, as
    encoder.safetensors and decoder.safetensors; it must have 4 groups, bottleneck 4 and the paper's
    gain.

    Args:
        runs: a run folder, or the folder above the run folders dvae, prior, clip and bpe
        out: folder to write; for huggingface it must be empty or new, or with --push hold an
            export of the same models, which is uploaded as it is
        to: the layout
        prior: run folder of the prior, if it is elsewhere
        dvae: run folder of the dVAE, if it is elsewhere
        clip: run folder of the CLIP, if it is elsewhere
        bpe: folder of tokenizer.json, if it is elsewhere
        shard_gigabytes: larger weights are cut into files of at most this size
        push: upload the folder to this repository of the hub, USER/NAME, by the token of
            `hf auth login` or HF_TOKEN
        private: make the repository private, if it is new
        dry_run: with --push, write OUT and show what would be uploaded
    """
    _refuse_wrong_flags(to, shard_gigabytes, push, dry_run)
    if to == OPENAI:
        for path in export_dvae(dvae or runs, out):
            LOG.info("wrote %s", path)
        return
    parts = find_parts(runs, {"prior": prior, "dvae": dvae, "clip": clip, "bpe": bpe})
    if push and holds_already(out / INDEX, digests_of(parts)):
        LOG.info("%s holds these models already", out)
    else:
        export_parts(parts, out, int(shard_gigabytes * 10**9))
        LOG.info("wrote %s", out)
    if push:
        _upload(out, push, private, dry_run)


def _refuse_wrong_flags(to: str, shard_gigabytes: float, push: str, dry_run: bool) -> None:
    problems = []
    if not shard_gigabytes > 0:
        problems.append("--shard-gigabytes must be above 0; the hub's is 5")
    if push and to != HUB:
        problems.append(f"--push uploads the layout {HUB}; leave out --to {to}")
    if dry_run and not push:
        problems.append("--dry-run shows what --push would upload; give --push USER/NAME")
    check(problems)
    if push:
        check_repository(push)


def _upload(folder: Path, repository: str, private: bool, dry_run: bool) -> None:
    if dry_run:
        print(listing(folder, repository, private))
        LOG.info("nothing was sent; leave out --dry-run to upload")
        return
    LOG.info("uploaded %s", push_folder(folder, repository, private))


def import_(arguments: list[str]) -> None:
    """`tapir import FOLDER OUT`."""

    def run(
        folder: PositionalPath,
        out: PositionalPath,
        layout: Annotated[str, tyro.conf.arg(name="from")] = "auto",
        pixels: int = 256,
        crop: Literal["random", "center"] = "random",
    ) -> None:
        """Turn exported models, or an image tokenizer of another project, into run folders.

        Image tokenizers: a dVAE of OpenAI's dall_e package as encoder.safetensors and
        decoder.safetensors; taming: a VQGAN of taming-transformers, with or without Gumbel head;
        llamagen: a VQ model of LlamaGen; diffusers: the folder of a VQModel; or a kind of an
        installed plug-in (docs/how-to/image-tokenizer.md). Weights are safetensors, or pickles that
        torch reads with weights_only. All but OpenAI's need `pip install tapir[tokenizers]`.

        Args:
            folder: what `tapir export` wrote, or the folder or file of an image tokenizer
            out: new folder for the run folders prior, dvae, clip and bpe; for an image tokenizer,
                the run folder for `tapir tokenize --dvae`
            layout: huggingface, openai-dvae, taming, llamagen, diffusers or a plug-in's kind; auto
                looks at the files
            pixels: of an image tokenizer: side of the square pictures to encode
            crop: of an image tokenizer but OpenAI's: random = the prior's crops, keyed by picture
                and variant; center = the central square
        """
        if layout == "auto":
            layout = _layout(folder)
        if layout == HUB:
            LOG.info("%s: %s", out, ", ".join(import_parts(folder, out)))
        elif layout == OPENAI:
            config = import_dvae(folder, out, pixels)
            LOG.info("%d codes on a grid of %d: %s", config.codebook, config.grid, out)
        else:
            import_tokenizer(folder, out, layout, ReadOptions(pixels=pixels, crop=crop))

    parse(run, arguments, "import")


def _layout(folder: Path) -> str:
    """The layout by the files of a folder; empty: a kind of image tokenizer."""
    if (folder / INDEX).is_file():
        return HUB
    is_openai = any((folder / f"{part}.safetensors").is_file() for part in PARTS)
    return OPENAI if is_openai else ""
