"""DPO of TRL on pairs in their order; prints the loss and the margin of every step as JSON, last."""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

folder, asked = Path(sys.argv[1]), json.loads(sys.argv[2])
torch.manual_seed(0)
rows = [json.loads(line) for line in (folder / "ordered.jsonl").read_text().splitlines()]
tokenizer = AutoTokenizer.from_pretrained(folder / "model")
model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
told: list[dict[str, float]] = []


class Kept(TrainerCallback):
    """Keeps what is logged at each step."""

    def on_log(self, args, state, control, logs=None, **others):
        if logs and "loss" in logs:
            told.append({"loss": logs["loss"], "margin": logs["rewards/margins"]})


settings = DPOConfig(
    output_dir=str(folder / "trl"),
    loss_type=[asked["loss_type"]],
    label_smoothing=0.1 if asked["loss_type"] == "robust" else 0.0,
    beta=asked["beta"],
    learning_rate=asked["rate"],
    lr_scheduler_type="constant",
    warmup_steps=0,
    weight_decay=0.0,
    max_grad_norm=1.0,
    per_device_train_batch_size=asked["batch"],
    max_steps=asked["steps"],
    logging_steps=1,
    logging_first_step=True,
    train_sampling_strategy="sequential",
    gradient_checkpointing=False,
    bf16=False,
    use_cpu=True,
    report_to="none",
    save_strategy="no",
)
trainer = DPOTrainer(
    model=model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[Kept()]
)
trainer.train()
print(json.dumps(told))
