"""The stages of the chain, in order, each in a room of its own."""

# verb on the command line -> where its stage is; imported when it is used, torch is heavy
STAGES = {
    "sft": "stages.sft.run:SftStage",
    "reward": "stages.reward.run:RewardStage",
    "ppo": "stages.ppo.run:PpoStage",
    "evaluate": "stages.evaluation.run:EvaluationStage",
    "export": "stages.export.run:ExportStage",
}
