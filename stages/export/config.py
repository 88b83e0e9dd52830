"""Settings of the export: in which forms the policy leaves the run folder."""

from pydantic import Field, model_validator

from pipeline.config import Section


class ExportSection(Section):
    """What `runs/NAME/export/` holds: folders that plain `peft` and `transformers` load."""

    adapter: bool = Field(
        True,
        description="Writes `adapter/`, the policy as a PEFT adapter, and beside it `base/` where "
        "the base is the run's own SFT model; a fully tuned policy has no adapter.",
    )
    merged: bool = Field(
        False,
        description="Writes `merged/`, the policy as one plain transformers model; a fully tuned "
        "policy is always written there.",
    )
    max_shard_size: str = Field(
        "5GB",
        pattern=r"^[1-9][0-9]*(KB|MB|GB)$",
        description="Largest weight file of `merged/` and `base/`, such as 500MB or 5GB.",
    )

    @model_validator(mode="after")
    def _something(self) -> "ExportSection":
        if not (self.adapter or self.merged):
            raise ValueError(
                "export.adapter and export.merged are both false, so nothing would be written: "
                "set one of them to true"
            )
        return self
