"""Transformers' generate and TRL's GRPOTrainer as workers of the benchmarks, in their fastest settings."""

from __future__ import annotations

import os
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}

import torch
import transformers
from laps import job, laps

what, workload, directory = job()
lap = laps()
on_gpu = torch.cuda.is_available()
model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, workload["dtype"]))
model = model.to("cuda" if on_gpu else "cpu")
prompts = torch.tensor(workload["prompt_tokens"], device=model.device)
versions = {"torch": torch.__version__, "transformers": transformers.__version__}


def prompt_logprob() -> float:
    """Mean log-probability of the prompts, by which the weights of the workers are compared."""
    with torch.no_grad():
        logprobs = model(prompts).logits[:, :-1].float().log_softmax(-1)
    return logprobs.gather(-1, prompts[:, 1:, None]).mean(dtype=torch.float32).item()


def peak() -> dict[str, int]:
    """Peak memory of the GPU; empty without one."""
    return {"peak_memory": torch.cuda.max_memory_allocated()} if on_gpu else {}


def rollout() -> None:
    """One lap: all completions of all prompts, at full length."""
    model.eval()
    request = lap(versions=versions, prompt_logprob=prompt_logprob())
    model.generation_config = transformers.GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=None, pad_token_id=0
    )
    rows = prompts.repeat_interleave(workload["samples"], dim=0)
    mask = torch.ones_like(rows)
    while True:
        with torch.inference_mode():
            length = request["completion_tokens"]
            tokens = model.generate(rows, attention_mask=mask, max_new_tokens=length, min_new_tokens=length)
            if on_gpu:
                torch.cuda.synchronize()
        request = lap(tokens=tokens[:, rows.shape[1] :].numel(), **peak())


def step() -> None:
    """One lap: one step of GRPO, from the rollout to the update."""
    import tokenizers
    import trl
    from datasets import Dataset

    size = workload["vocabulary"]
    # The ids of <end> and <pad> are beyond the vocabulary of the model, so every completion has its full length.
    symbols = {str(number): number for number in range(size)} | {"<end>": size, "<pad>": size + 1}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(symbols, unk_token="<pad>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<pad>")
    tokenizer.padding_side = "left"

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        lengths.extend(map(len, completion_ids))
        return [sum(2 * token < size for token in ids) / len(ids) for ids in completion_ids]

    lengths: list[int] = []

    class EachStep(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if on_gpu:
                torch.cuda.synchronize()
            lap(tokens=sum(lengths), reported=state.log_history[-1] if state.log_history else {}, **peak())
            lengths.clear()

    rows = len(workload["prompt_tokens"]) * workload["samples"]
    arguments = trl.GRPOConfig(
        output_dir=str(directory / "trl"),
        per_device_train_batch_size=workload.get("trl_rows", rows),
        gradient_accumulation_steps=rows // workload.get("trl_rows", rows),
        num_generations=workload["samples"],
        max_completion_length=workload["completion_tokens"],
        max_steps=10**6,
        temperature=1.0,
        top_k=0,
        beta=workload["kl"],
        epsilon=workload["clip"],
        loss_type="grpo",
        learning_rate=workload["learning_rate"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=False,
        gradient_checkpointing=False,
        use_vllm=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=not on_gpu,
        shuffle_dataset=False,
    )
    found = prompt_logprob()
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": [" ".join(map(str, p)) for p in workload["prompt_tokens"]]}),
        processing_class=tokenizer,
        callbacks=[EachStep()],
    )
    if trainer.ref_model is not None:
        trainer.ref_model.load_state_dict(model.state_dict())
    lap(versions=versions | {"trl": trl.__version__}, prompt_logprob=found)
    trainer.train()


{"rollout": rollout, "step": step}[what]()
