"""Options that several verbs share, as types of their parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loftq.cli import parse
from loftq.config import BLOCK_SIZES, CODEBOOKS, SCALE_DTYPES, SCALES

# headings of the help; what has none stands first
MODULES = "Which modules, and how many bits each"
QUANTIZER = "Quantizer"
CALIBRATION = "Calibration"
ADAPTER = "Adapter"
DATA = "Data"
TRAINING = "Training"
MEASURING = "Measuring"
RUNNING = "Running"


def choices(values: tuple[object, ...]) -> str:
    """Values of an option as its help lists them."""
    return ", ".join(map(str, values))


# the source and its modules
Source = Annotated[str, typer.Argument(help="Folder with safetensors, .gguf file, or hub id.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
TargetModules = Annotated[
    list[str] | None,
    typer.Option(
        help="all-linear, names (repeatable or with commas), or a regular expression, as in PEFT.",
        show_default="all-linear",
        rich_help_panel=MODULES,
    ),
]
ExcludeModules = Annotated[
    list[str] | None,
    typer.Option(help="Names (repeatable or with commas), or a regular expression.", rich_help_panel=MODULES),
]

# the quantizer
Codebook = Annotated[
    str | None, typer.Option(help=f"{choices(CODEBOOKS)}.", show_default="lloyd", rich_help_panel=QUANTIZER)
]
Scale = Annotated[
    str | None, typer.Option(help=f"{choices(SCALES)}.", show_default="search", rich_help_panel=QUANTIZER)
]
ScaleDtype = Annotated[
    str | None, typer.Option(help=f"{choices(SCALE_DTYPES)}.", show_default="float16", rich_help_panel=QUANTIZER)
]
BlockSize = Annotated[
    int, typer.Option(help=f"Weights that share a scale: {choices(BLOCK_SIZES)}.", rich_help_panel=QUANTIZER)
]
DoubleQuant = Annotated[bool, typer.Option(help="Store scales in 8 bits.", rich_help_panel=QUANTIZER)]
Published = Annotated[
    bool,
    typer.Option("--published", help="The papers' quantizer: nf, absmax, float32 scales.", rich_help_panel=QUANTIZER),
]
BitsPattern = Annotated[list[str] | None, typer.Option(help="PATTERN=BITS, repeatable.", rich_help_panel=MODULES)]
RankPattern = Annotated[list[str] | None, typer.Option(help="PATTERN=RANK, repeatable.", rich_help_panel=MODULES)]
FirstLayersBits = Annotated[
    str | None, typer.Option(help="LAYERS:BITS, the paper's mixed precision, e.g. 16:4.", rich_help_panel=MODULES)
]
QuantizeEmbeddings = Annotated[
    bool, typer.Option(help="Quantize the input embedding as well.", rich_help_panel=MODULES)
]
PlanFile = Annotated[
    Path | None,
    typer.Option(help="File of `loftq plan`: bits, block size and rank of every module.", rich_help_panel=MODULES),
]

# calibration
CalibrationSamples = Annotated[int, typer.Option(help="Windows of calibration text.", rich_help_panel=CALIBRATION)]
CalibrationLength = Annotated[int, typer.Option(help="Tokens of a window.", rich_help_panel=CALIBRATION)]
CalibrationGradients = Annotated[
    int,
    typer.Option(
        help="Windows to run a backward pass on: what errors do to the model's loss; 0 for none.",
        rich_help_panel=CALIBRATION,
    ),
]
NoCalibration = Annotated[
    bool,
    typer.Option(
        "--no-calibration", help="Weight-only: every error of a weight counts alike.", rich_help_panel=CALIBRATION
    ),
]
Statistics = Annotated[
    Path | None,
    typer.Option(
        help="File of `loftq calibrate`: statistics of the inputs, instead of a text.", rich_help_panel=CALIBRATION
    ),
]
Damping = Annotated[
    float | None,
    typer.Option(
        help="From 0, only outputs count, to 1, only weights count.",
        show_default="the method's own",
        rich_help_panel=CALIBRATION,
    ),
]

# data
Data = Annotated[str, typer.Option(help=parse.DATA_HELP)]
TrainSplit = Annotated[str, typer.Option(help="Split to train on.", rich_help_panel=DATA)]
EvalData = Annotated[
    str | None,
    typer.Option(
        help="What to measure on.", show_default="none, or --data with --eval-split", rich_help_panel=MEASURING
    ),
]
EvalSplit = Annotated[
    str | None,
    typer.Option(
        help="Split to measure on.", show_default="none, or validation with --eval-data", rich_help_panel=MEASURING
    ),
]
EvalLimit = Annotated[
    int | None, typer.Option(help="Measure on the first rows only.", show_default="all", rich_help_panel=MEASURING)
]
Map = Annotated[list[str] | None, typer.Option("--map", help=parse.MAP_HELP, rich_help_panel=DATA)]
Labels = Annotated[
    str | None,
    typer.Option(help="Classes in the order of their numbers.", show_default="from the data", rich_help_panel=DATA),
]
Limit = Annotated[int | None, typer.Option(help="Use the first rows only.", show_default="all", rich_help_panel=DATA)]
MaxLength = Annotated[
    int | None, typer.Option(help="Tokens of an input.", show_default="the task's usual", rich_help_panel=DATA)
]
MaxTargetLength = Annotated[int, typer.Option(help="Tokens of a summary.", rich_help_panel=DATA)]
DocStride = Annotated[
    int | None,
    typer.Option(help="Tokens that neighbouring windows of a context share.", show_default="128", rich_help_panel=DATA),
]
Packing = Annotated[
    bool | None,
    typer.Option(
        "--packing/--no-packing", help="Several texts to a window.", show_default="causal only", rich_help_panel=DATA
    ),
]
JoinRows = Annotated[
    bool,
    typer.Option(
        "--join-rows",
        help="Rows of running text are lines of one text: no token between them ends one.",
        rich_help_panel=DATA,
    ),
]
PromptTemplate = Annotated[str, typer.Option(help="What a prompt is put into.", rich_help_panel=DATA)]

# training
Epochs = Annotated[float, typer.Option(help="Passes over the data.", rich_help_panel=TRAINING)]
MaxSteps = Annotated[
    int | None, typer.Option(help="Steps, instead of epochs.", show_default="by epochs", rich_help_panel=TRAINING)
]
BatchSize = Annotated[int, typer.Option(help="Examples at once.", rich_help_panel=TRAINING)]
LearningRate = Annotated[
    float, typer.Option("--learning-rate", "--lr", help="Largest learning rate.", rich_help_panel=TRAINING)
]

RougeStem = Annotated[
    bool | None,
    typer.Option(
        "--rouge-stem/--no-rouge-stem",
        help="ROUGE of word stems.",
        show_default="the run's, or stems",
        rich_help_panel=MEASURING,
    ),
]

# models and runs
InitFrom = Annotated[
    Path | None, typer.Option(help="Where the model is now that a run was trained on, if it was moved.")
]
Adapter = Annotated[Path | None, typer.Option(help="Another adapter's folder; the fitted one by default.")]
Window = Annotated[int | None, typer.Option(help="Tokens the model sees at once.", show_default="1024 or its limit")]
GradientCheckpointing = Annotated[
    bool,
    typer.Option("--gradient-checkpointing", help="Compute activations twice, keep few.", rich_help_panel=TRAINING),
]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]
