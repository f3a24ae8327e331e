"""The verbs tokenize, export, import, verify, seen, batch, diverge and replay."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from checkpoint.format import MANIFEST
from checkpoint.reader import finished_steps, open_checkpoint
from core.cli import parse, print_json
from core.errors import InputError
from core.log import LOG
from core.memory import keep_freed_memory
from core.out_folder import refuse_others_folder
from core.settings import check
from core.store import open_store
from data_pipeline.bpe import load_tokenizer
from data_pipeline.config import TokenizeConfig
from data_pipeline.manifest import NAME, SPLITS
from data_pipeline.tokenize.encode import Encoders
from data_pipeline.tokenize.member import member_of
from data_pipeline.tokenize.worker import Worker
from data_pipeline.verify import verify_split
from models.codes import CodeReader
from parallel.device import worker_device
from parallel.precision import set_numerics
from training.export import DESCRIPTION, describe, load_dvae, model_is_whole
from training.history import History
from training.huggingface import INDEX, export_parts, find_parts, import_parts
from training.openai_dvae import export_dvae, import_dvae

Source = Annotated[str, tyro.conf.Positional]
_FLAT = tyro.conf.OmitArgPrefixes


def tokenize(arguments: list[str]) -> None:
    """`tapir tokenize RAW TOKENS`."""

    def run(
        raw: Source,
        tokens: Source,
        dvae: Path = Path("runs/dvae"),
        bpe: Path = Path("runs/bpe"),
        worker: str = "",
        again: bool = False,
        config: Annotated[TokenizeConfig, _FLAT] = TokenizeConfig(),  # noqa: B008
    ) -> None:
        """Turn raw shards into token shards: dVAE codes and text ids; restartable.

        Args:
            raw: where `tapir pack` wrote
            tokens: s3://bucket/prefix or a folder for the tokens
            dvae: run folder of a finished dVAE
            bpe: folder of tokenizer.json
            worker: which part of the job this process begins with, i/n with i from 0; by default
                what a Slurm array, a Kubernetes indexed job, MPI or torchrun says
            again: check finished shards and make damaged ones anew
            config: settings
        """
        check(config.problems())
        refuse_others_folder(tokens, "a data set")
        member = member_of(worker)
        tokenizer, tokenizer_hash = load_tokenizer(bpe)
        describe(dvae, "dvae")  # tokens of a dVAE that still trains would fit no prior
        model, model_hash = load_dvae(dvae)
        device = worker_device(member.number)
        if device.type == "cpu":
            keep_freed_memory()
        encoders = Encoders(
            numerics=set_numerics(device, precision=config.precision),
            codes=CodeReader(model.to(device), config.precision),
            dvae_hash=model_hash,
            tokenizer=tokenizer,
            tokenizer_hash=tokenizer_hash,
        )
        job = Worker(open_store(raw), open_store(tokens), encoders, config, member)
        LOG.info("worker %s made %d shards", member.text, job.run(again))

    parse(run, arguments, "tokenize")


def export(arguments: list[str]) -> None:
    """`tapir export RUNS OUT`."""

    def run(
        runs: Annotated[Path, tyro.conf.Positional],
        out: Annotated[Path, tyro.conf.Positional],
        to: Literal["huggingface", "openai-dvae"] = "huggingface",
        prior: Path | None = None,
        dvae: Path | None = None,
        clip: Path | None = None,
        bpe: Path | None = None,
        shard_gigabytes: float = 5.0,
    ) -> None:
        """Write trained models as safetensors + JSON for others; `tapir import` reads them back.

        huggingface: dVAE, prior, CLIP and tokenizer in one folder, as on the Hugging Face hub, with
        a model card. Of a run that has not ended it takes the newest checkpoint. openai-dvae: a
        dVAE in the layout of OpenAI's public dall_e package, as encoder.safetensors and
        decoder.safetensors; it must have 4 groups, bottleneck 4 and the paper's gain.

        Args:
            runs: a run folder, or the folder above the run folders dvae, prior, clip and bpe
            out: folder to write; for huggingface it must be empty or new
            to: the layout
            prior: run folder of the prior, if it lies elsewhere
            dvae: run folder of the dVAE, if it lies elsewhere
            clip: run folder of the CLIP, if it lies elsewhere
            bpe: folder of tokenizer.json, if it lies elsewhere
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
        folder: Annotated[Path, tyro.conf.Positional],
        out: Annotated[Path, tyro.conf.Positional],
        layout: Annotated[
            Literal["auto", "huggingface", "openai-dvae"], tyro.conf.arg(name="from")
        ] = "auto",
        pixels: int = 256,
    ) -> None:
        """Turn exported models into finished ones of Tapir's, with the same digests.

        Args:
            folder: what `tapir export` wrote; or a dVAE of OpenAI's dall_e package as
                encoder.safetensors and decoder.safetensors (no pickles)
            out: new folder for the run folders prior, dvae, clip and bpe; of OpenAI's layout the
                run folder that `tapir tokenize --dvae` takes
            layout: the layout; auto looks at the files
            pixels: of OpenAI's layout: side of the square pictures it is to be used for
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


def seen(arguments: list[str]) -> None:
    """`tapir seen ID`."""

    def run(pair: Source, run: Path = Path("runs/prior"), json: bool = False) -> None:
        """Say at which training steps a pair is read.

        Args:
            pair: its id, or its key
            run: run folder of a prior, dVAE or CLIP
            json: print a JSON object on the last line
        """
        steps = History(run).seen(pair)
        text = ", ".join(map(str, steps)) or "never: left out at the ends of its epochs"
        LOG.info("%s is read at step %s", pair, text)
        if json:
            print_json({"steps": steps})

    parse(run, arguments, "seen")


def batch(arguments: list[str]) -> None:
    """`tapir batch STEP`."""

    def run(
        step: Annotated[int, tyro.conf.Positional],
        run: Path = Path("runs/prior"),
        json: bool = False,
    ) -> None:
        """List the pairs of a training step: slot, id, key (of raw pairs), shard, block, record.

        Args:
            step: the step, as in metrics.jsonl
            run: run folder of a prior, dVAE or CLIP
            json: print a JSON object on the last line
        """
        rows = History(run).batch(step)
        for row in rows:
            LOG.info(
                "%5d  %d %s  %s block %d record %d",
                *(row.slot, row.id, row.key, row.shard, row.block, row.record),
            )
        if json:
            print_json({"pairs": rows})

    parse(run, arguments, "batch")


def diverge(arguments: list[str]) -> None:
    """`tapir diverge A B`."""

    def run(
        first: Annotated[Path, tyro.conf.Positional],
        second: Annotated[Path, tyro.conf.Positional],
        checkpoint: Path | None = None,
        tolerance: float | None = None,
        json: bool = False,
    ) -> None:
        """Find the first tensor in which two runs differ, over one step from one checkpoint.

        Exits with 0 whether they differ or not.

        Args:
            first: run folder whose mesh and engine are taken for right
            second: run folder to compare with it
            checkpoint: a folder step-N to start from; default the newest of the first run
            tolerance: relative difference of a tensor that still counts as equal; by default 1e-5,
                and 2e-2 if a run has 16 bits
            json: print a JSON object on the last line
        """
        from training import diverge as comparison  # noqa: PLC0415 - imports every engine's parts

        if tolerance is not None and not tolerance >= 0:
            raise InputError(f"--tolerance {tolerance} must not be negative")
        found = comparison.diverge(first, second, checkpoint, tolerance)
        for row in found[:1]:
            where = f" on rank {row.rank}" if row.rank >= 0 else ""
            LOG.info(
                "first difference: %s pass, layer %s, %s%s: %.3g relative; %d tensors differ",
                *(row.direction, row.layer, row.tensor, where, row.relative, len(found)),
            )
        if not found:
            LOG.info("no tensor differs by more than the tolerance")
        if json:
            print_json({"differences": found})

    parse(run, arguments, "diverge")


def replay(arguments: list[str]) -> None:
    """`tapir replay CAPSULE`."""

    def run(capsule: Annotated[Path, tyro.conf.Positional], json: bool = False) -> None:
        """Run a step that did not count (a spike, NaN or corruption) again, on one process.

        Args:
            capsule: a file of the run folder's capsules
            json: print a JSON object on the last line
        """
        from training import replay as again  # noqa: PLC0415 - imports every engine's parts

        found = again.replay(capsule)
        LOG.info("%s", again.describe(found))
        if json:
            print_json(found)

    parse(run, arguments, "replay")


def verify(arguments: list[str]) -> None:
    """`tapir verify PATH`."""

    def run(path: Source, sample: float = 1.0) -> None:
        """Check every digest of a data set, a run folder, a checkpoint or a finished model.

        Args:
            path: s3://bucket/prefix or a folder
            sample: share of a data set's blocks that is read; 1 = every byte of its shards
        """
        if not 0 < sample <= 1:
            raise InputError(f"--sample {sample} must be above 0 and at most 1")
        checked = verify_path(path, sample)
        if not checked:
            raise InputError(f"{path} holds no data set, checkpoint or finished model")
        print_json({"verified": checked})

    parse(run, arguments, "verify")


def verify_path(path: str, sample: float = 1.0) -> list[str]:
    """Check all that lies there; returns what was checked.

    Raises: CorruptError naming the first damaged file.
    """
    store, found = open_store(path), []
    for split in SPLITS:
        if store.exists(f"{split}/{NAME}"):
            count = verify_split(store, split, sample)
            what = "shards" if sample >= 1 else "blocks"
            found.append(f"{path}/{split}: {count} {what}")
        elif any(name.endswith(".tar") for name in store.names(f"{split}/")):
            LOG.warning("%s/%s has shards and no %s: it is not checked", path, split, NAME)
    name = path.rstrip("/").rpartition("/")[2]
    if name.startswith("step-") and store.exists(MANIFEST):
        found.append(open_checkpoint(path).url)
    for root in (path, f"{path.rstrip('/')}/checkpoints"):
        found += _verify_checkpoints(root)
    folder = Path(path)
    if "://" in path:
        return found
    if (folder / DESCRIPTION).exists():
        for stage in ("dvae", "prior", "clip"):
            try:
                describe(folder, stage)
                found.append(f"{folder}/{DESCRIPTION}")
            except InputError:
                continue
    return found


def _verify_checkpoints(root: str) -> list[str]:
    store = open_store(root)
    steps = finished_steps(store)
    found = {name.split("/")[0] for name in store.names("step-")}
    for name in sorted(found - {f"step-{step}" for step in steps}):
        LOG.warning("%s/%s has no manifest: it was never finished, and is not checked", root, name)
    return [open_checkpoint(f"{root}/step-{step}").url for step in steps]
