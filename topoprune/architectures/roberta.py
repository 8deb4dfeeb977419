"""RoBERTa and the models that only change its vocabulary: module names as in BERT."""

from dataclasses import replace

from topoprune.architectures.bert import BERT

__all__ = ["ROBERTA"]

ROBERTA = replace(BERT, model_types=("roberta", "xlm-roberta", "camembert"))
