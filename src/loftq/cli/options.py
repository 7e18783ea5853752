"""Options that several verbs share, as types of their parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loftq.cli import parse
from loftq.config import BLOCK_SIZES, CODEBOOKS, SCALE_DTYPES, SCALES


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
    ),
]
ExcludeModules = Annotated[
    list[str] | None, typer.Option(help="Names (repeatable or with commas), or a regular expression.")
]

# the quantizer
Codebook = Annotated[str | None, typer.Option(help=f"{choices(CODEBOOKS)}.", show_default="lloyd")]
Scale = Annotated[str | None, typer.Option(help=f"{choices(SCALES)}.", show_default="search")]
ScaleDtype = Annotated[str | None, typer.Option(help=f"{choices(SCALE_DTYPES)}.", show_default="float16")]
BlockSize = Annotated[int, typer.Option(help=f"Weights that share a scale: {choices(BLOCK_SIZES)}.")]
DoubleQuant = Annotated[bool, typer.Option(help="Store scales in 8 bits.")]
Published = Annotated[bool, typer.Option("--published", help="The papers' quantizer: nf, absmax, float32 scales.")]
BitsPattern = Annotated[list[str] | None, typer.Option(help="PATTERN=BITS, repeatable.")]
RankPattern = Annotated[list[str] | None, typer.Option(help="PATTERN=RANK, repeatable.")]
FirstLayersBits = Annotated[str | None, typer.Option(help="LAYERS:BITS, the paper's mixed precision, e.g. 16:4.")]
QuantizeEmbeddings = Annotated[bool, typer.Option(help="Quantize the input embedding as well.")]
PlanFile = Annotated[Path | None, typer.Option(help="File of `loftq plan`: bits, block size and rank of every module.")]

# calibration
CalibrationSamples = Annotated[int, typer.Option(help="Windows of calibration text.")]
CalibrationLength = Annotated[int, typer.Option(help="Tokens of a window.")]
CalibrationGradients = Annotated[
    int, typer.Option(help="Windows to run a backward pass on: what errors do to the model's loss; 0 for none.")
]
NoCalibration = Annotated[
    bool, typer.Option("--no-calibration", help="Weight-only: every error of a weight counts alike.")
]
Statistics = Annotated[
    Path | None, typer.Option(help="File of `loftq calibrate`: statistics of the inputs, instead of a text.")
]
Damping = Annotated[
    float | None,
    typer.Option(help="From 0, only outputs count, to 1, only weights count.", show_default="the method's own"),
]

# data
Data = Annotated[str, typer.Option(help=parse.DATA_HELP)]
TrainSplit = Annotated[str, typer.Option(help="Split to train on.")]
EvalData = Annotated[
    str | None, typer.Option(help="What to measure on.", show_default="none, or --data with --eval-split")
]
EvalSplit = Annotated[
    str | None, typer.Option(help="Split to measure on.", show_default="none, or validation with --eval-data")
]
EvalLimit = Annotated[int | None, typer.Option(help="Measure on the first rows only.", show_default="all")]
Map = Annotated[list[str] | None, typer.Option("--map", help=parse.MAP_HELP)]
Labels = Annotated[
    str | None, typer.Option(help="Classes in the order of their numbers.", show_default="from the data")
]
Limit = Annotated[int | None, typer.Option(help="Use the first rows only.", show_default="all")]
MaxLength = Annotated[int | None, typer.Option(help="Tokens of an input.", show_default="the task's usual")]
MaxTargetLength = Annotated[int, typer.Option(help="Tokens of a summary.")]
DocStride = Annotated[
    int | None, typer.Option(help="Tokens that neighbouring windows of a context share.", show_default="128")
]
Packing = Annotated[
    bool | None,
    typer.Option("--packing/--no-packing", help="Several texts to a window.", show_default="causal only"),
]
JoinRows = Annotated[
    bool,
    typer.Option("--join-rows", help="Rows of running text are lines of one text: no token between them ends one."),
]
PromptTemplate = Annotated[str, typer.Option(help="What a prompt is put into.")]

# training
Epochs = Annotated[float, typer.Option(help="Passes over the data.")]
MaxSteps = Annotated[int | None, typer.Option(help="Steps, instead of epochs.", show_default="by epochs")]
BatchSize = Annotated[int, typer.Option(help="Examples at once.")]
LearningRate = Annotated[float, typer.Option("--learning-rate", "--lr", help="Largest learning rate.")]

RougeStem = Annotated[
    bool | None,
    typer.Option("--rouge-stem/--no-rouge-stem", help="ROUGE of word stems.", show_default="the run's, or stems"),
]

# models and runs
InitFrom = Annotated[
    Path | None, typer.Option(help="Where the folder is now that a run was trained on, if it was moved.")
]
Adapter = Annotated[Path | None, typer.Option(help="Another adapter's folder; the fitted one by default.")]
Window = Annotated[int | None, typer.Option(help="Tokens the model sees at once.", show_default="1024 or its limit")]
GradientCheckpointing = Annotated[
    bool, typer.Option("--gradient-checkpointing", help="Compute activations twice, keep few.")
]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]
