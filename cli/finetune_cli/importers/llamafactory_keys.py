"""The options of a LLaMA-Factory file that set no field of a FineTuneJob. The import ignores some of them, and refuses the others.

The names come from the tool's argument classes (`src/llamafactory/hparams`) and from the Megatron adapters that it can use.
"""

from __future__ import annotations

from finetune_cli.importers.draft import OptionRow
from finetune_cli.importers.options import (
    DEVICES_REASON,
    RANKS_REASON,
    SPEED_REASON,
    make_ignored_options,
    make_refused_options,
)
from finetune_cli.importers.training_arguments import LIGER_REASON

INFERENCE_REASON = "the option belongs to inference, evaluation or export"
MEGATRON_REASON = "the option belongs to Megatron, which the trainer does not use"
IGNORED_OPTION_ROWS: tuple[OptionRow, ...] = (
    *make_ignored_options(INFERENCE_REASON, "do_sample temperature top_p top_k num_beams max_length max_new_tokens repetition_penalty length_penalty "
             "skip_special_tokens infer_backend infer_dtype use_kv_cache offload_folder vllm_maxlen vllm_gpu_util vllm_enforce_eager "
             "vllm_max_lora_rank vllm_config "
             "sglang_maxlen sglang_mem_fraction sglang_tp_size sglang_config sglang_lora_backend export_dir export_size export_device "
             "export_quantization_bit export_quantization_dataset export_quantization_nsamples export_quantization_maxlen export_legacy_format "
             "export_hub_model_id eval_num_beams task task_dir lang n_shot save_dir download_mode batch_size"),
    *make_ignored_options("prepared rows are cached in the job's work folder",
        "overwrite_cache tokenized_path data_shared_file_system preprocessing_batch_size "
             "streaming buffer_size cache_dir"),
    *make_ignored_options("padding is never part of the loss", "ignore_pad_token_for_loss"),
    *make_ignored_options("the trainer measures one validation loss over all sources", "eval_on_each_dataset"),
    *make_ignored_options("the metrics are in the job's storage; a report can show them",
             "plot_loss include_effective_tokens_per_second compute_accuracy print_param_status"),
    *make_ignored_options(SPEED_REASON, "use_v1_kernels use_reentrant_gc kt_cpu_activation"),
    *make_ignored_options(LIGER_REASON, "enable_liger_kernel"),
    *make_ignored_options(DEVICES_REASON, "quantization_device_map compute_dtype"),
    *make_ignored_options(RANKS_REASON, "ray_run_name ray_storage_path ray_init_kwargs master_addr master_port resources_per_worker placement_strategy"),
    *make_ignored_options("the trainer chooses the tokenizer of the model's repository", "use_fast_tokenizer resize_vocab"),
    *make_ignored_options("dataset.maxSequenceLength limits the length", "model_max_length block_diag_attn"),
    *make_ignored_options("the trainer does not write profiles", "enable_torch_profiler profiler_output_dir profiler_wait_steps profiler_warmup_steps "
             "profiler_active_steps profiler_repeat profiler_record_shapes profiler_profile_memory profiler_with_stack profile_modules"),
    *make_ignored_options("only with use_galore, use_apollo or use_badam", "galore_target galore_rank galore_update_interval galore_scale galore_proj_type "
             "galore_layerwise apollo_target apollo_rank apollo_update_interval apollo_scale apollo_proj apollo_proj_type apollo_scale_type apollo_layerwise "
             "apollo_scale_front badam_mode badam_start_block badam_switch_mode badam_switch_interval badam_update_ratio badam_mask_mode badam_verbose"),
    *make_ignored_options("only with finetuning_type freeze or oft",
        "freeze_trainable_layers freeze_trainable_modules freeze_extra_modules module_dropout oft_rank "
             "oft_block_size oft_target"),
    *make_ignored_options("only with stage ppo", "ppo_buffer_size ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards reward_model reward_model_adapters "
             "reward_model_quantization_bit reward_model_type"),
    *make_ignored_options("only with use_asft_loss, use_eaft_loss or pref_loss simpo", "asft_alpha eaft_alpha simpo_gamma"),
    *make_ignored_options("only with pissa_init; the trainer converts the adapter itself", "pissa_iter pissa_convert"),
    *make_ignored_options("a FineTuneJob reports to wandb, tensorboard, mlflow and mongodb", "use_swanlab swanlab_project swanlab_workspace swanlab_run_name "
             "swanlab_mode swanlab_logdir swanlab_lark_webhook_url"),
    *make_ignored_options("only vision and audio models have these modules", "freeze_vision_tower freeze_multi_modal_projector"),
    *make_ignored_options("only with fp8", "fp8_backend"),
    *make_ignored_options(MEGATRON_REASON, "use_distributed_optimizer overlap_param_gather overlap_grad_reduce overlap_p2p_comm bias_activation_fusion "
             "apply_rope_fusion masked_softmax_fusion cross_entropy_loss_fusion moe_grouped_gemm moe_token_dispatcher_type "
             "moe_permute_fusion moe_shared_expert_overlap "
             "moe_layer_recompute moe_router_dtype calculate_per_token_loss use_packed_sequences export_hf_on_finish variable_seq_lengths "
             "recompute_granularity recompute_method recompute_num_layers account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split "
             "virtual_pipeline_model_parallel_size transformer_impl swap_optimizer additional_configs num_layers_in_first_pipeline_stage "
             "num_layers_in_last_pipeline_stage megatron_bridge_args extra_config gradient_accumulation_fusion async_save ddp_bucket_size "
             "delay_wgrad_compute overlap_moe_expert_parallel_comm accumulate_allreduce_grads_in_fp32"),
)  # fmt: skip
REFUSED_OPTION_ROWS: tuple[OptionRow, ...] = (
    *make_refused_options("training on images, video or audio",
        "media_dir image_max_pixels image_min_pixels image_do_pan_and_scan crop_to_patches video_max_pixels "
             "video_min_pixels video_fps video_maxlen use_audio_in_video audio_sampling_rate freeze_language_model"),
    *make_refused_options("FP8 training", "fp8 fp8_enable_fsdp_float8_all_gather", "write bf16: true"),
    *make_refused_options("the optimizer GaLore", "use_galore"),
    *make_refused_options("the optimizer APOLLO", "use_apollo"), *make_refused_options("the optimizer BAdam", "use_badam"),
    *make_refused_options("the optimizer Adam-mini", "use_adam_mini"), *make_refused_options("the optimizer Muon", "use_muon"),
    *make_refused_options("LLaMA Pro", "use_llama_pro"), *make_refused_options("mixture of depths", "mixture_of_depths"),
    *make_refused_options("shifted sparse attention", "shift_attn"),
    *make_refused_options("a loss other than the cross entropy", "use_dft_loss use_asft_loss use_eaft_loss"),
    *make_refused_options("KTransformers",
        "use_kt kt_config kt_weight_path kt_non_expert_weight_path kt_expert_checkpoint_path kt_use_lora_experts kt_lora_expert_num "
             "kt_lora_expert_intermediate_size"),
    *make_refused_options("training with Megatron or HyperParallel",
             "use_mca use_megatron_bridge use_hyper_parallel hyper_parallel_args megatron_pretrained_checkpoint"),
    *make_refused_options("tensor parallelism", "tensor_model_parallel_size", "write 1, and use FSDP or DeepSpeed", 1),
    *make_refused_options("pipeline parallelism", "pipeline_model_parallel_size", "write 1, and use FSDP or DeepSpeed", 1),
    *make_refused_options("expert parallelism", "expert_model_parallel_size expert_tensor_parallel_size", "write 1, and use FSDP or DeepSpeed", 1),
    *make_refused_options("context parallelism", "context_parallel_size hyper_parallel_cp_size sequence_parallel", "write 1, and a shorter cutoff_len", 1),
    *make_refused_options("changing the model's architecture or configuration", "rope_scaling moe_aux_loss_coef", "store a changed config.json with the model"),
    *make_refused_options("random initial weights", "train_from_scratch"),
    *make_refused_options("norms and outputs in 32 bits", "upcast_layernorm upcast_lmhead_output"),
    *make_refused_options("splitting special tokens", "split_special_tokens"),
    *make_refused_options("initial embeddings of new tokens from texts that describe them",
             "new_special_tokens_config init_special_tokens", "write noise_init", "noise_init"),
    *make_refused_options("training on the last answer of a conversation only", "mask_history"),
    *make_refused_options("a fixed order of the rows", "disable_shuffling"),
    *make_refused_options("a format of tool calls other than that of the chat template", "tool_format"),
    *make_refused_options("arguments of the chat template", "preserve_thinking"),
    *make_refused_options("the loss term of BCO", "pref_bco_weight"),
    *make_refused_options("length desensitisation in DPO", "ld_alpha", "", 1),
    *make_refused_options("different weights for good and bad answers in KTO", "kto_chosen_weight kto_rejected_weight", "write 1", 1),
    *make_refused_options("an adapter or a quantisation of the reference model", "ref_model_adapters ref_model_quantization_bit"),
    *make_refused_options("label smoothing in the sigmoid loss", "dpo_label_smoothing"),
    *make_refused_options("different learning rates for different modules", "loraplus_lr_embedding", "", 1e-6),
    *make_refused_options("a new adapter on top of a merged adapter", "create_new_adapter"),
    *make_refused_options("several adapters in one folder", "adapter_folder"),
)  # fmt: skip
