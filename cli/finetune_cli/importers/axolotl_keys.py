"""The options of an Axolotl file that set no field of a FineTuneJob. The import ignores some of them, and refuses the others.

The names come from Axolotl's schema (`src/axolotl/utils/schemas` and the arguments of its integrations) and from its older releases.
"""

from __future__ import annotations

from finetune_cli.importers.draft import OptionRow
from finetune_cli.importers.options import (
    DEVICES_REASON,
    LOADER_REASON,
    RANKS_REASON,
    SPEED_REASON,
    make_ignored_options,
    make_option_groups,
    make_refused_options,
)

ONLY_TRACKERS_REASON = (
    "a FineTuneJob reports to wandb, tensorboard, mlflow and mongodb; the metrics are also in the job's storage"
)
IGNORED_OPTION_ROWS: tuple[OptionRow, ...] = (
    *make_ignored_options("the trainer reads the class from the model's own configuration", "tokenizer_type base_model_config is_falcon_derived_model "
             "is_llama_derived_model is_mistral_derived_model is_qwen_derived_model tokenizer_use_fast tokenizer_legacy "
             "tokenizer_save_jinja_files base_model_ignore_patterns"),
    *make_ignored_options("prepared rows are cached in the job's work folder", "dataset_prepared_path num_dataset_shards_to_save dataset_keep_in_memory "
             "is_preprocess preprocess_iterable skip_prepare_dataset push_dataset_to_hub"),
    *make_ignored_options(LOADER_REASON, "dataloader_pin_memory dataloader_num_workers dataloader_prefetch_factor dataloader_drop_last accelerator_config "
             "remove_unused_columns pad_to_sequence_len pad_to_multiple_of streaming streaming_multipack_buffer_size pretrain_multipack_buffer_size "
             "shuffle_before_merging_datasets multipack_real_batches batch_flattening collator_pad_to_longest"),
    *make_ignored_options("the trainer packs with one method over the whole data set", "sample_packing_group_size sample_packing_bin_size "
             "sample_packing_mp_start_method sample_packing_sequentially eval_sample_packing sample_packing_eff_est total_num_tokens "
             "total_supervised_tokens pretrain_multipack_attn max_packed_sequence_len"),
    *make_ignored_options(DEVICES_REASON, "device device_map max_memory gpu_memory_limit low_cpu_mem_usage experimental_skip_move_to_device lora_on_cpu"),
    *make_ignored_options(RANKS_REASON, "world_size local_rank ddp ddp_timeout ddp_bucket_cap_mb ddp_broadcast_buffers ddp_find_unused_parameters use_ray "
             "ray_run_name resources_per_worker"),
    *make_ignored_options(SPEED_REASON,
        "tf32 torch_compile torch_compile_backend torch_compile_mode torch_compile_options deepcompile flex_attn_compile_kwargs "
             "flash_attn_cross_entropy flash_attn_cross_entropy_loss flash_attn_rms_norm flash_attn_fuse_mlp flash_attn_fuse_qkv flash_optimum "
             "flash_attn_d512 large_head_attention gemma4_hybrid_attn_impl sdpa_varlen fused_attn_kernel lora_mlp_kernel lora_qkv_kernel "
             "lora_o_kernel lora_embedding_kernel chunked_cross_entropy chunked_cross_entropy_num_chunks cut_cross_entropy tiled_mlp "
             "tiled_mlp_num_shards tiled_mlp_use_original_mlp use_kernels experts_implementation use_scattermoe use_sonicmoe use_dsv4_kernels "
             "use_glm_dsa_kernels expert_backend moe_grouped_backend moe_dequant_chunk_size moe_bnb_fast dsv4_shared_mlp_lora_kernel "
             "torch_empty_cache_steps gc_collect_steps gc_steps gradient_checkpointing_kwargs selective_checkpointing layer_offloading "
             "dpo_use_liger_kernel dpo_padding_free dpo_use_logits_to_keep precompute_ref_log_probs heads_k_stride ring_attn_func "
             "unsloth_cross_entropy_loss unsloth_lora_mlp unsloth_lora_qkv unsloth_lora_o unsloth_rms_norm unsloth_rope xformers_attention"),
    *make_ignored_options("experts stay in 16 bits, which needs more GPU memory", "quantize_moe_experts"),
    *make_ignored_options("the trainer adapts the embeddings to the tokens itself", "resize_token_embeddings_to_32x mean_resizing_embeddings shrink_embeddings "
             "fix_untrained_tokens embeddings_skip_upcast peft_autocast_adapter_dtype lora_fan_in_fan_out qlora_sharded_model_loading"),
    *make_ignored_options("the operator detects a job whose loss diverges, and does what policy.onDivergence says",
        "loss_watchdog_threshold loss_watchdog_patience"),
    *make_ignored_options("the end of each turn comes from the chat template", "eot_tokens"),
    *make_ignored_options("the final model is always safetensors", "save_safetensors"),
    *make_ignored_options("checkpoints always contain the state of the optimizer, so that the job can resume", "save_only_model"),
    *make_ignored_options("the trainer keeps the newest checkpoints and the best one", "save_first_step"),
    *make_ignored_options("checkpoints can be requested at any time; see the guide about checkpoints", "dynamic_checkpoint"),
    *make_ignored_options("only the final model is pushed", "hub_strategy"),
    *make_ignored_options("the trainer reports its own speed", "include_tokens_per_second include_tkps profiler_steps profiler_steps_start"),
    *make_ignored_options("the option belongs to Axolotl's own command line", "strict axolotl_config_path debug test_value config_path"),
    *make_ignored_options("the option belongs to merging and inference",
        "merge_lora merge_method merge_dequant nvfp4_merge_aware_start_step gradio_title gradio_share "
             "gradio_server_name gradio_server_port gradio_max_new_tokens gradio_temperature"),
    *make_ignored_options("for private data, set model.tokenSecretRef to a Secret with a token of the hub", "hf_use_auth_token"),
    *make_ignored_options(ONLY_TRACKERS_REASON, "wandb_watch wandb_run_id wandb_log_model hf_mlflow_log_artifacts use_comet comet_workspace comet_project_name "
             "comet_experiment_key comet_mode comet_online comet_experiment_config use_trackio trackio_project_name trackio_run_name trackio_space_id "
             "use_swanlab swanlab_project swanlab_experiment_name swanlab_description swanlab_mode swanlab_workspace swanlab_log_model swanlab_web_host "
             "swanlab_api_host swanlab_log_completions swanlab_completion_log_interval swanlab_completion_max_buffer swanlab_lark_webhook_url "
             "use_otel_metrics otel_metrics_host otel_metrics_port eval_table_size"),
    *make_ignored_options("answers are not generated during training; see evaluation.comparison",
        "generate_samples num_generation_samples generation_max_new_tokens "
             "generation_temperature generation_top_p generation_top_k generation_prompt_ratio generation_do_sample eval_max_new_tokens "
             "dpo_generate_during_eval"),
    *make_ignored_options("the best checkpoint is the one with the lowest validation loss", "greater_is_better"),
    *make_ignored_options("the tool does not read this option any more",
        "torchdistx_path gptq_groupsize gptq_model_v1 gptq_disable_exllama eta_min landmark_attention "
             "xpos_rope is_file lora_out_dir bf16_full_eval"),
    *make_ignored_options("adapters are saved and published without change", "nvfp4_merge_aware"),
)  # fmt: skip

REFUSED_OPTION_ROWS: tuple[OptionRow, ...] = (
    *make_refused_options("training on images, video or audio",
        "processor_type processor_kwargs image_size image_resize_algorithm role_boundaries freeze_mm_modules"),
    *make_refused_options("quantisation-aware training", "qat"),
    *make_refused_options("quantisation after training", "quantization llmcompressor", "quantise the final model with another program"),
    *make_refused_options("FP8 training", "fp8 fp8_enable_fsdp_float8_all_gather dsv4_fp8_nonexpert_mode dsv4_fp8_lora_kernel gemma4_fp8_nonexpert",
             "write bf16: true"),
    *make_refused_options("training on a base model in NVFP4", "dsv4_fp4_grouped_mode dsv4_bf16_all gemma4_nf4_nonexpert nonexpert_quantization",
             "use the unquantised model"),
    *make_refused_options("training on a GPTQ model", "gptq", "use the unquantised model with load_in_4bit"),
    *make_refused_options("1.58-bit training", "use_onebitllms"),
    *make_refused_options("tensor parallelism", "tensor_parallel_size", "write 1, and shard with fsdp_config", 1),
    *make_refused_options("expert parallelism", "expert_parallel_size expert_parallel_backend expert_parallel_num_nvl_bytes expert_parallel_num_rdma_bytes "
             "expert_parallel_token_capacity expert_parallel_fallback_on_unsupported", "write 1, and shard with fsdp_config", 1),
    *make_refused_options("a loss other than the cross entropy", "use_eaft eaft_alpha eaft_k liger_use_token_scaling"),
    *make_refused_options("training of a process reward model", "process_reward_model"),
    *make_refused_options("the loss term center_rewards_coefficient of reward models", "center_rewards_coefficient"),
    *make_refused_options("an option of DPO that weights or normalises the loss", "dpo_use_weighting dpo_norm_loss rpo_alpha dpo_loss_weights"),
    *make_refused_options("SimPO and CPO", "simpo_gamma cpo_alpha"),
    *make_refused_options("different weights for good and bad answers in KTO", "kto_desirable_weight kto_undesirable_weight", "write 1", 1),
    *make_refused_options("energy-based fine-tuning", "ebft"),
    *make_refused_options("diffusion language models", "diffusion noise_schedule min_mask_ratio max_mask_ratio"),
    *make_refused_options("distillation", "kd_trainer kd_ce_alpha kd_alpha kd_temperature kd_beta kd_normalize_topk kd_online_server_base_url kd_online_topk "
             "kd_online_server kd_online_timeout kd_temperature_min"),
    *make_refused_options("ReLoRA", "relora relora_steps relora_warmup_steps relora_anneal_steps relora_prune_ratio relora_prune_method relora_cpu_offload"),
    *make_refused_options("restarts of the learning rate in the middle of training",
        "jagged_restart_steps jagged_restart_warmup_steps jagged_restart_anneal_steps"),
    *make_refused_options("LISA", "lisa_n_layers lisa_step_interval lisa_layers_attribute"),
    *make_refused_options("MoRA", "mora"), *make_refused_options("DenseMixer", "dense_mixer"),
    *make_refused_options("Grokfast", "grokfast_alpha grokfast_lamb"),
    *make_refused_options("training with a remote service",
        "hatchery nemo_gym_enabled nemo_gym_dir nemo_gym_auto_clone nemo_gym_config_paths nemo_gym_head_port "
             "nemo_gym_server_timeout nemo_gym_verify_timeout nemo_gym_run_timeout nemo_gym_datasets nemo_gym_auto_start nemo_gym_model_name "
             "nemo_gym_multi_turn nemo_gym_max_turns"),
    *make_refused_options("PoSE", "use_pose pose_split_on_token_ids pose_max_context_len pose_num_chunks"),
    *make_refused_options("changing the model's architecture or configuration", "overrides_of_model_config model_config scaling_softmax scaling_softmax_factor "
             "scaling_softmax_bias rope_scaling s2_attention llama4_linearized_experts", "store a changed config.json with the model"),
    *make_refused_options("options for loading the model", "overrides_of_model_kwargs model_kwargs"),
    *make_refused_options("random initial weights", "reinit_weights"),
    *make_refused_options("a trainer class in Python", "trainer_cls"),
    *make_refused_options("different learning rates for different modules", "lr_groups embedding_lr embedding_lr_scale loraplus_lr_embedding",
             "write loraplus_lr_ratio for LoRA+", 1e-6),
    *make_refused_options("this option of the learning rate schedule",
        "lr_quadratic_warmup cosine_constant_lr_ratio lr_div_factor log_sweep_min_lr log_sweep_max_lr"),
    *make_refused_options("an optimizer outside transformers",
        "dion_lr dion_momentum dion_rank_fraction dion_rank_multiple_of adam_beta3 adam_epsilon2 qgalore_rank "
             "qgalore_update_proj_gap qgalore_scale qgalore_proj_type qgalore_proj_quant qgalore_proj_bits qgalore_proj_group_size "
             "qgalore_cos_threshold qgalore_gamma_proj qgalore_queue_size optim_target_modules"),
    *make_refused_options("options of the optimizer beyond learning rate, betas, epsilon and weight decay", "optim_args"),
    *make_refused_options("a search for the batch size", "auto_find_batch_size", "policy.onOutOfMemory: Adapt retries with a smaller batch"),
    *make_refused_options("an adapter with several ranks, or in some of the layers only",
             "lora_rank_pattern lora_alpha_pattern peft_layers_to_transform peft_layers_pattern peft_layer_replication",
             "write lora_target_modules with the names of the modules"),
    *make_refused_options("training of single rows of the embeddings", "peft_trainable_token_indices", "write tokens for new tokens"),
    *make_refused_options("tied weights in adapters", "peft_ensure_weight_tying"),
    *make_refused_options("replacing reserved tokens of the tokenizer", "added_tokens_overrides", "write tokens"),
    *make_refused_options("the mistral-common tokenizer", "tokenizer_use_mistral_common", "give a tokenizer of transformers with --set model.tokenizer=URI"),
    *make_refused_options("a fixed order of the rows", "curriculum_sampling"),
    *make_refused_options("training on one shard of the rows of a data set", "dataset_shard_num dataset_shard_idx"),
    *make_refused_options("a lower limit for the length of rows", "min_sample_len"),
    *make_refused_options("a separate maximum length for prompts or for evaluation", "max_prompt_len eval_sequence_len", "write sequence_len"),
    *make_refused_options("concatenating the rows of plain text", "pretraining_sample_concatenation"),
    *make_refused_options("metrics that need generated answers during training",
        "do_causal_lm_eval eval_causal_lm_metrics do_bench_eval bench_dataset bench_split",
             "set evaluation.metrics"),
    *make_refused_options("choosing the best checkpoint by another metric than the validation loss", "metric_for_best_model", "write eval_loss", "loss",
        "eval_loss"),
    *make_refused_options("norms in 32 bits", "fp32_norms fp32_norm_classes"),
    *make_refused_options("benchmarks without a folder with their data", "lm_eval_tasks lm_eval_batch_size lm_eval_post_train lm_eval_model",
             "set evaluation.benchmarks with --set"),
    *make_refused_options("reward functions from Python modules", "trl.reward_funcs trl.rollout_func", "store them in a ConfigMap and set trainer.rewards"),
    *make_refused_options("this option of GRPO",
        "trl.reward_weights trl.importance_sampling_level trl.sync_ref_model trl.min_p trl.top_k trl.repetition_penalty "
             "trl.generation_kwargs trl.num_iterations trl.epsilon trl.epsilon_high trl.mask_truncated_completions trl.multi_objective_aggregation "
             "trl.off_policy_mask_threshold trl.use_bias_correction_kl trl.replay_buffer_size", "", 1),
)  # fmt: skip
GRPO_IGNORED_OPTION_ROWS: tuple[OptionRow, ...] = (
    *make_ignored_options("the trainer generates the answers itself",
        "trl.use_vllm trl.vllm_mode trl.vllm_server_host trl.vllm_server_port trl.vllm_server_timeout "
             "trl.vllm_guided_decoding_regex trl.vllm_enable_sleep_mode trl.vllm_sync_interval trl.vllm_importance_sampling_correction "
             "trl.vllm_importance_sampling_mode trl.vllm_importance_sampling_cap trl.vllm_lora_sync trl.generation_batch_size trl.use_data_producer "
             "trl.async_prefetch trl.prefetch_depth trl.streaming_partial_batch trl.streaming_min_groups trl.reward_num_workers "
             "trl.replay_recompute_logps trl.reroll_start_fraction trl.reroll_max_groups trl.skip_zero_advantage_batches trl.use_liger_loss vllm"),
    *make_ignored_options("metrics of the rewards are always logged", "trl.log_completions trl.num_completions_to_print"),
    *make_ignored_options("only with trl.sync_ref_model", "trl.ref_model_mixup_alpha trl.ref_model_sync_steps"),
    *make_ignored_options("rewards are always scaled by their standard deviation", "trl.scale_rewards"),
)  # fmt: skip
OPTION_GROUP_ROWS: tuple[OptionRow, ...] = make_option_groups(
    "fsdp_config special_tokens trl peft peft.loftq_config bnb_config_kwargs model_quantization_config_kwargs"
)

FSDP_NAMES = (
    "fsdp_version", "activation_checkpointing", "offload_params", "sync_module_states", "cpu_ram_efficient_loading", "cpu_offload_pin_memory",
    "use_orig_params", "state_dict_type", "final_state_dict_type", "auto_wrap_policy", "transformer_layer_cls_to_wrap", "min_num_params",
    "reshard_after_forward", "mixed_precision_policy", "limit_all_gathers", "sharding_strategy", "backward_prefetch", "forward_prefetch",
)  # fmt: skip
"""Keys of `fsdp_config`. Older files write each key with the prefix `fsdp_`."""
FEATURE_BY_PLUGIN = {
    "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin": "", "axolotl.integrations.liger.LigerPlugin": "",
    "axolotl.integrations.kernels.KernelsPlugin": "", "axolotl.integrations.swanlab.SwanLabPlugin": "",
    "axolotl.integrations.spectrum.SpectrumPlugin": "", "axolotl.integrations.expert_parallel.ExpertParallelPlugin": "expert parallelism",
    "axolotl.integrations.diffusion.DiffusionPlugin": "diffusion language models", "axolotl.integrations.kd.KDPlugin": "distillation",
    "axolotl.integrations.grokfast.GrokfastPlugin": "Grokfast", "axolotl.integrations.densemixer.DenseMixerPlugin": "DenseMixer",
    "axolotl.integrations.mora.MoraPlugin": "MoRA", "axolotl.integrations.hatchery.HatcheryPlugin": "training with a remote service",
    "axolotl.integrations.nemo_gym.NemoGymPlugin": "training with a remote service",
    "axolotl.integrations.llm_compressor.LLMCompressorPlugin": "quantisation after training",
    "axolotl.integrations.lm_eval.LMEvalPlugin": "benchmarks without a folder with their data",
}  # fmt: skip
"""For each plugin that is part of Axolotl: the feature that a FineTuneJob does not have.

The text is empty if the import reads the options of the plugin.
"""
