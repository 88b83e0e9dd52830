"""Stage 1: supervised fine-tuning on demonstrations.

Maximum likelihood of the response tokens given the prompt (InstructGPT, arXiv:2203.02155, section
3.5), the end token among them, so that the model learns to stop. Deliberate deviation: the loss of
a step is divided by its response tokens, not by its demonstrations, as everywhere in this pipeline.

    rlhf sft configs/quickstart.yaml
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.codec import Codec
from pipeline.errors import DataError
from pipeline.hf_trainer import FitSummary
from pipeline.models.trunk import Handle
from pipeline.records import Demonstration, PromptText, each_reply
from pipeline.rendering import PLAIN_CHAT_TEMPLATE
from pipeline.stage import Context, Summary
from pipeline.trainer_callbacks import MeasuredMemory
from stages.sft.trainer import DemonstrationRows, SftTrainer


class SftStage:
    """From a base model and demonstrations to the model that the other stages start from."""

    name = "sft"
    title = "supervised fine-tuning"
    samples = False

    def needs(self, config: Any) -> tuple[str, ...]:
        """It starts the chain."""
        return ()

    def reads(self, config: Any) -> tuple[str, ...]:
        """Demonstrations."""
        return ("demonstrations",)

    def resources(self, config: Any) -> Mapping[str, str]:
        """The base, where one is loaded."""
        path = config.model.path
        return {} if path is None else {"model.path": path}

    def run(self, context: Context) -> Summary:
        """Train, evaluate, and leave the model as the stage's artifact.

        Raises:
            DataError: no demonstration to train on.
            ModelError: the base cannot be loaded, or has too few positions.
            TrainingError: a loss or a gradient is NaN or infinite.
        """
        split = context.corpus.demonstrations
        if not split.train:
            raise DataError(
                "data.demonstrations has no row left to train on: all were bad or held out "
                "(see data.json in the run folder). Lower data.held_out_fraction or add rows"
            )
        handle = trainable(base_handle(context, split.train), context)
        handle.codec.counts.clear()
        section = context.config.sft
        train = tokenised(handle.codec, replies(split.train, every=section.all_turns))
        evaluated = replies(split.held_out, every=section.all_turns)[: section.eval_rows]
        held_out = tokenised(handle.codec, evaluated)
        cuts = context.report_cuts(handle.codec)
        fit = train_handle(handle, train, held_out, context)
        context.save(handle)
        return {
            **({"eval_loss": fit.held_out["loss"]} if fit.held_out else {}),
            **({"perplexity": fit.held_out["perplexity"]} if fit.held_out else {}),
            "train_loss": fit.train_loss,
            "steps": fit.steps,
            "kept_step": fit.kept_step,
            "train_rows": len(train),
            "held_out_rows": len(held_out),
            "train_tokens": sum(train.lengths),
            "train_response_tokens": sum(train.units),
            "rows_per_second": fit.rows / fit.seconds,
            **cuts,
        }


def base_handle(context: Context, train: Sequence[Demonstration]) -> Handle:
    """The base model: loaded, or built with a tokenizer trained on the training split's text."""
    context.runtime.seed_all("sft")
    if context.config.model.init == "config":
        return context.store.build(tokenizer_texts(train))
    base = context.store.pretrained()
    context.config.check_positions(
        f"model.path {context.config.model.path}", base.trunk.model.config
    )
    return base


def trainable(base: Handle, context: Context) -> Handle:
    """The handle that SFT trains: a new adapter on the frozen base, or the base itself.

    Nobody else holds the base yet, so full fine-tuning needs no copy of it: saved, its trunk stands
    for the SFT model, and whoever asks for the base again has it loaded again.
    """
    config = context.config
    if config.sft.tuning == "lora":
        return context.store.trainable_copy(base, "sft", "lora", config.lora)
    return base.with_role("sft")


def train_handle(
    handle: Handle, train: DemonstrationRows, held_out: DemonstrationRows, context: Context
) -> FitSummary:
    """Train what the handle's role trains; its trunk is frozen again afterwards."""
    section = context.config.sft
    for parameter in handle.parameters():
        parameter.requires_grad_(True)
    context.runtime.shard(handle.trunk)
    trainer = SftTrainer(
        role=handle.role,
        module=handle.trunk,
        section=section,
        run=context.config.run,
        folder=context.folder.root,
        train=train,
        held_out=held_out if len(held_out) else None,
        log=context.tracker.log,
        console=context.console,
        title="SFT",
        states=context.states,
    )
    roles = {"sft": handle}
    if handle.role.adapter is not None:
        roles = {"base": handle.with_role("base", adapter=None), "sft": handle}
    trainer.add_callback(MeasuredMemory(roles, context.folder.memory_json))
    handle.trunk.recompute = section.gradient_checkpointing
    fit = trainer.fit()
    handle.trunk.freeze()
    return fit


def replies(rows: Sequence[Demonstration], *, every: bool) -> Sequence[Demonstration]:
    """What is trained on of conversations: `every` assistant turn, or the last one of each."""
    return [reply for row in rows for reply in each_reply(row)] if every else rows


def tokenised(codec: Codec, demonstrations: Sequence[Demonstration]) -> DemonstrationRows:
    """Demonstrations as rows of token ids."""
    pairs = [codec.pair_ids(row.prompt, row.response) for row in demonstrations]
    return DemonstrationRows(pairs, codec.pad_id, demonstrations)


def tokenizer_texts(demonstrations: Sequence[Demonstration]) -> list[str]:
    """What a new tokenizer learns from: prompts as they will be rendered, and responses."""
    return [text for row in demonstrations for text in (_plain_text(row.prompt), row.response)]


def _plain_text(prompt: PromptText) -> str:
    if isinstance(prompt, str):
        return prompt
    from transformers.utils.chat_template_utils import render_jinja_template

    turns = [{"role": turn.role, "content": turn.content} for turn in prompt]
    return str(render_jinja_template([turns], chat_template=PLAIN_CHAT_TEMPLATE)[0][0])
