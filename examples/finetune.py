"""Fine-tune a quantized folder on a text file: the packed backbone stays frozen, the adapter learns.

python examples/finetune.py my-model-2bit --text my-text.txt --out my-adapter
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoTokenizer, Trainer, TrainingArguments, default_data_collator

import loftq


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    model = loftq.load(args.folder, adapter=args.adapter, trainable=True, dtype=args.dtype)
    blocks = token_blocks(tokenizer, args.text.read_text(encoding="utf-8"), args.length)
    held_out = max(1, len(blocks) // 10)
    settings = TrainingArguments(
        output_dir=str(args.out),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=args.steps // 20,
        logging_steps=max(1, args.steps // 20),
        save_strategy="no",
        report_to="none",
        seed=args.seed,
        **({"gradient_checkpointing": True} if args.gradient_checkpointing else {}),
    )
    trainer = Trainer(
        model=model,
        args=settings,
        train_dataset=blocks[:-held_out],
        eval_dataset=blocks[-held_out:],
        data_collator=default_data_collator,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(json.dumps({"held_out_loss_before": before, "held_out_loss_after": after, "adapter": str(args.out)}))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder that `loftq quantize` has written")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text file; the last tenth is held out")
    parser.add_argument("--out", type=Path, required=True, help="folder for the adapter")
    parser.add_argument("--adapter", type=Path, help="adapter to go on from (default: the fitted one)")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps (default: 200)")
    parser.add_argument("--batch-size", type=int, default=4, help="blocks a step (default: 4)")
    parser.add_argument("--length", type=int, default=256, help="tokens a block (default: 256)")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="peak learning rate (default: 3e-4)")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")
    parser.add_argument("--dtype", default="float32", help="of everything that is not packed (default: float32)")
    parser.add_argument("--seed", type=int, default=0, help="of data order and dropout (default: 0)")
    return parser.parse_args(arguments)


def token_blocks(tokenizer, text: str, length: int) -> list[dict[str, torch.Tensor]]:
    """The text as consecutive blocks of ``length`` tokens, each its own label; a shorter rest is dropped."""
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    blocks = [{"input_ids": block, "labels": block} for block in ids.split(length) if block.numel() == length]
    if len(blocks) < 2:
        raise SystemExit(f"the text has {ids.numel()} tokens, expected at least two blocks of {length}; lower --length")
    return blocks


if __name__ == "__main__":
    main()
