"""What clpet knows of each method of peft that peft's own config does not state. Imports no torch.

`METHODS` are the methods that clpet trains, under the names of peft.PeftType; `REFUSED` are the others and variants of
LoRA, with the reason. A test runs every method on every kind of model and compares.
"""

from dataclasses import dataclass

DATA_INIT = "it initialises LoRA from activations or gradients on data, before there is a task: use peft=pissa or olora"


@dataclass(frozen=True)
class PeftTraits:
    """What an option of the group `peft` can do; methods, objectives, hardware and exports ask for it.

    `trains`: something is trained at all. `saves_model`: the trained model is saved, not an adapter. `full`: weights of
    the backbone are trained, or copies of them; it is then kept in fp32. `several`: more than one adapter can be
    attached, so that a method can have one per task. `keeps_backbone`: with the adapter off the network is the
    pretrained one. `mergeable`: the result can be written into the backbone's weights. `transposed`: supports the
    transposed linear layers (Conv1D) of GPT-2. `nf4`: supports quantized weights. `shards`: supports a backbone that is
    divided over ranks. `lora_factors`: only LoRA's A and B are trained. `prepends`: virtual tokens stand before the
    text's embeddings; `prefixes`: before the keys and values of every layer. `normalises`: adapts norm layers by
    default, `embeds`: the embedding. `adds_blocks`: the network gets more blocks.
    """

    trains: bool = True
    saves_model: bool = False
    full: bool = False
    several: bool = True
    keeps_backbone: bool = True
    mergeable: bool = True
    transposed: bool = False
    nf4: bool = False
    shards: bool = False
    lora_factors: bool = False
    prepends: bool = False
    prefixes: bool = False
    normalises: bool = False
    embeds: bool = False
    adds_blocks: bool = False


METHODS = {
    "ADAMSS": PeftTraits(),
    "BEFT": PeftTraits(),
    "BOFT": PeftTraits(),
    "C3A": PeftTraits(),
    "DEFT": PeftTraits(),
    "DELORA": PeftTraits(),
    "FOURIERFT": PeftTraits(transposed=True),
    "FROD": PeftTraits(transposed=True),
    "GLORA": PeftTraits(),
    "GRALORA": PeftTraits(transposed=True),
    "HIRA": PeftTraits(transposed=True),
    "HRA": PeftTraits(),
    "IA3": PeftTraits(transposed=True, nf4=True, shards=True),
    "LILY": PeftTraits(mergeable=False),
    "LN_TUNING": PeftTraits(full=True, normalises=True, transposed=True),
    "LOHA": PeftTraits(),
    "LOKR": PeftTraits(),
    "LORA": PeftTraits(transposed=True, nf4=True, shards=True, lora_factors=True),
    "MISS": PeftTraits(),
    "OFT": PeftTraits(),
    "OSF": PeftTraits(full=True, keeps_backbone=False),
    "PEANUT": PeftTraits(),
    "PREFIX_TUNING": PeftTraits(mergeable=False, transposed=True, nf4=True, shards=True, prefixes=True),
    "PROMPT_TUNING": PeftTraits(mergeable=False, transposed=True, nf4=True, shards=True, prepends=True),
    "PSOFT": PeftTraits(),
    "PVERA": PeftTraits(transposed=True),
    "P_TUNING": PeftTraits(mergeable=False, transposed=True, prepends=True),
    "RANDLORA": PeftTraits(transposed=True),
    "ROAD": PeftTraits(),
    "SHIRA": PeftTraits(),
    "SUPERTUNING": PeftTraits(),
    "TINYLORA": PeftTraits(),
    "TRAINABLE_TOKENS": PeftTraits(several=False, transposed=True, embeds=True),
    "UNILORA": PeftTraits(transposed=True),
    "VBLORA": PeftTraits(transposed=True),
    "VERA": PeftTraits(transposed=True),
    "WAVEFT": PeftTraits(transposed=True),
}

REFUSED = {
    "adalora": "its ranks follow a schedule over one training of known length, which a sequence of tasks is not: use "
    "peft=lora",
    "adaption_prompt": "it swaps the attention layers of LLaMA, Mistral and GPT-2, and its tensors have no name of an "
    "adapter under which they could be saved: use peft=prefix",
    "arrow": "it routes between adapters that were trained before: use method=sapt, mocl or dynamic_conpet",
    "cartridge": "it starts from the keys and values of a long text, which clpet does not read: use peft=prefix",
    "corda": DATA_INIT,
    "cpt": "it needs the tokens of in-context examples and marks for each of them: use peft=prompt",
    "eva": DATA_INIT,
    "loftq": "it needs bitsandbytes and rounds the backbone itself: use peft=lora hardware.quantization=nf4",
    "lora_ga": DATA_INIT,
    "multitask_prompt_tuning": "it needs the task of every example, also of a test example: use "
    "method=progressive_prompts",
    "poly": "it needs the task of every example, also of a test example: use method=mocl or sapt",
    "shadow": "its layers pass objects to each other that the networks of transformers do not accept: use peft=lora",
    "xlora": "it mixes LoRA adapters that were trained before: use method=sapt or mocl",
}

# Fields of peft's configs that are not options here, and why.
REFUSED_FIELDS = {
    "bias": "trains biases of the backbone, which belong to no adapter",
    "modules_to_save": "trains copies of whole layers in the backbone's precision: peft=none trains all layers",
    "trainable_token_indices": "changes the embedding: use peft=trainable_tokens",
    "layer_replication": "changes the network: use peft=blocks",
    "target_parameters": "adapts bare parameters, which the targets of clpet do not name",
    "target_modules": "is called peft.targets here",
    "loftq_config": REFUSED["loftq"],
    **dict.fromkeys(
        ("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"),
        "would load another tokenizer, from anywhere",
    ),
    **dict.fromkeys(("megatron_config", "megatron_core"), "is for another library"),
}
