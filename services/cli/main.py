"""`feddymem`: start services, inspect images, see status, run the demo, compare methods.

Exit codes: 0 done; 1 failed; 2 a wrong flag, setting or input folder; 3 a server cannot be reached or refuses; 4 some
images could not be inspected; 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

import feddymem
from services.cli.calls import AGGREGATOR, INFERENCE, AsJson, Server, TlsDir
from services.cli.certs import certs
from services.cli.exit_codes import FAILED, INTERRUPTED, REFUSED, USAGE
from services.cli.failures import fail
from services.cli.feedback import feedback
from services.cli.operator import operator
from services.cli.release import release

# OpenMP threads that wait shall sleep soon, not spin: torch's would hold the cores that OpenVINO's threads need, and
# beside another busy process one forward pass took 2,000 ms instead of 45. Sleeping at once (0) makes torch's many
# short operations slow instead. Read when torch is loaded, which the commands do.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

app = typer.Typer(
    help="Federated anomaly detection with dynamic memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(certs, name="certs")
app.add_typer(release, name="release")
app.add_typer(operator, name="operator")
app.add_typer(feedback, name="feedback")

_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(feddymem.__version__)
        raise typer.Exit


@app.command(context_settings=_PASS_ON)
def edge(context: typer.Context) -> None:
    """Start a site's edge client (`feddymem edge --help` lists its settings)."""
    from services.edge_client.main import main as run

    _run_service(run, context.args)


@app.command(context_settings=_PASS_ON)
def aggregator(context: typer.Context) -> None:
    """Start the aggregator (`feddymem aggregator --help` lists its settings)."""
    from services.aggregator.main import main as run

    _run_service(run, context.args)


@app.command(context_settings=_PASS_ON)
def inference(context: typer.Context) -> None:
    """Start the inference service (`feddymem inference --help` lists its settings)."""
    from services.inference.main import main as run

    _run_service(run, context.args)


@app.command()
def backup(
    state_dir: Annotated[Path, typer.Argument(help="State folder of an aggregator, which may be running.")],
    target: Annotated[Path, typer.Argument(help="Folder to make.")],
) -> None:
    """Copy an aggregator's state; to restore, start it with the copy as its state folder."""
    from services.aggregator.backup import BackupError
    from services.aggregator.backup import backup as run

    try:
        run(state_dir, target)
    except (BackupError, OSError, ValueError) as error:
        fail(str(error), FAILED)


@app.command()
def inspect(
    images: Annotated[
        list[str], typer.Argument(help="Image files, folders of images at any depth, or patterns ('parts/**/*.png').")
    ],
    server: Annotated[
        str, typer.Option(help="HOST:PORT of the service, or a gRPC target; dns:///NAME:PORT goes round all addresses.")
    ] = INFERENCE,
    tls_dir: TlsDir = None,
    federation: Annotated[str, typer.Option(help="Federation; needed where the service has several.")] = "",
    site: Annotated[str, typer.Option(help="Site; needed where the service has several.")] = "",
    threshold: Annotated[
        float | None,
        typer.Option(min=0, help="Score from which an image is anomalous; without it, the calibrated one."),
    ] = None,
    pixel_threshold: Annotated[
        float | None,
        typer.Option(min=0, help="Distance from which pixels make up regions; --regions has the calibrated."),
    ] = None,
    false_alarm_rate: Annotated[
        float | None,
        typer.Option(help="Share of normal images that may be called anomalous; without it, the federation's."),
    ] = None,
    regions: Annotated[bool, typer.Option("--regions", help="Find regions, by the calibrated threshold.")] = False,
    heatmap: Annotated[Path | None, typer.Option(help="Folder to write a heatmap PNG for each image to.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line instead of a table.")] = False,
    csv: Annotated[
        str | None, typer.Option(help="File to write results to as CSV instead of a table; - for standard output.")
    ] = None,
) -> None:
    """Score images at an inference service; results in the order of the images."""
    from services.cli.inspect import Inspection
    from services.cli.inspect import inspect as run

    asked = Inspection(
        images=tuple(images),
        server=server,
        tls_dir=tls_dir,
        federation=federation,
        site=site,
        threshold=threshold,
        pixel_threshold=pixel_threshold,
        false_alarm_rate=false_alarm_rate,
        regions=regions,
        heatmaps=heatmap,
        as_json=as_json,
        csv=csv,
    )
    raise typer.Exit(run(asked))


@app.command()
def status(
    server: Server = AGGREGATOR,
    tls_dir: TlsDir = None,
    federation: Annotated[str, typer.Option(help="Only this federation.")] = "",
    as_json: AsJson = False,
    inference: Annotated[str, typer.Option(help="HOST:PORT of an inference service, to show that one instead.")] = "",
) -> None:
    """Show federations, rounds, sites and releases of an aggregator, or what an inference service scores and finds."""
    from services.cli.inference_status import inference_status
    from services.cli.status import status as run

    if inference:
        inference_status(inference, tls_dir, federation, as_json)
    else:
        run(server, tls_dir, federation, as_json)


@app.command()
def demo(
    data: Annotated[
        Path | None,
        typer.Option(help="Site folders in the MVTec AD layout, a CSV or a mixture in YAML; without it, synthetic."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for report.html and report.json.")] = Path("out"),
    with_prometheus: Annotated[
        bool,
        typer.Option(
            "--with-prometheus",
            help="Have a Prometheus watch it by the rules of monitoring/, and leave all of it running until Ctrl-C.",
        ),
    ] = False,
) -> None:
    """Run a whole federation on this machine, inspect all test images, and write a report."""
    with _evaluation_packages():
        from services.demo.main import demo as run

    raise typer.Exit(run(data, out, with_prometheus))


@app.command()
def evaluate(
    data: Annotated[Path, typer.Argument(help="Site folders in the MVTec AD layout, a CSV or a mixture in YAML.")],
    out: Annotated[Path, typer.Option(help="Folder for report.json, report.html and report.md.")],
    methods: Annotated[str, typer.Option(help="Names separated by commas; without it, all.")] = "",
    seeds: Annotated[str, typer.Option(help="Separated by commas (0,1,2), or their number (3).")] = "0",
    train_images: Annotated[
        int | None, typer.Option(min=1, help="Normal images of each site to use, drawn by the seed; without it, all.")
    ] = None,
    memory_items: Annotated[
        int | None, typer.Option(min=1, max=2**20, help="Items of the global memory, at most; without it, the default.")
    ] = None,
    hold_out_share: Annotated[
        float,
        typer.Option(min=0, max=0.5, help="Share of each site's normal images that is held out; 0 for no verdicts."),
    ] = 0.2,
    cache: Annotated[
        Path | None, typer.Option(help="Folder that keeps patch features, up to 4 GiB; without it, the user's cache.")
    ] = None,
    backbone: Annotated[str, typer.Option(help="timm model; without it, the embedded one.")] = "",
    checkpoint: Annotated[Path | None, typer.Option(help="The backbone's weights as safetensors.")] = None,
    input_size: Annotated[int, typer.Option(help="Side of the square that images are stretched to, in pixels.")] = 224,
    tile_size: Annotated[
        int | None, typer.Option(help="Side of the tiles that the network sees; without it, the whole image.")
    ] = None,
    tile_overlap: Annotated[int, typer.Option(help="How far tiles overlap at least, in pixels.")] = 64,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
) -> None:
    """Compare methods on a data set, in this process, and write a report."""
    from feddymem.method import Method

    with _evaluation_packages():
        from services.evaluate.main import Backbone
        from services.evaluate.main import evaluate as run

    chosen = Backbone(backbone, checkpoint, input_size, tile_size, tile_overlap, device)
    method = Method(memory_items=memory_items or Method().memory_items, hold_out_share=hold_out_share)
    raise typer.Exit(run(data, out, methods, seeds, train_images, method, cache, chosen))


@contextmanager
def _evaluation_packages() -> Iterator[None]:
    """Ends the command where the packages of the extra `evaluation` are not installed, as in the services' images."""
    try:
        yield
    except ModuleNotFoundError as error:
        fail(f"{error}; this command needs more packages than the services: install feddymem[evaluation]", FAILED)


def _run_service(run: Callable[[list[str]], None], args: list[str]) -> None:
    from feddymem.client.tls import TlsError
    from feddymem.datasets import DatasetError
    from services.edge_client.participant import ParticipationError
    from services.runtime.settings import InvalidSettingsError
    from services.runtime.trace_export import InvalidVariableError

    try:
        run(args)
    except (InvalidSettingsError, InvalidVariableError, DatasetError, TlsError) as error:
        fail(str(error), USAGE)
    except ParticipationError as error:
        fail(str(error), REFUSED)
    except (OSError, ValueError) as error:
        fail(str(error), FAILED)


def main() -> None:
    """Entry point of the `feddymem` command."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
