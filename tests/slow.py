"""What ``make sweep`` runs and ``make test`` does not: cases that take long and say little beside those that stay, each with the reason."""

from __future__ import annotations

import re

# A pattern of test ids (``re.search``), and what makes the case one of the sweep.
SWEEP = {
    r"test_production\.py::test_eager_one_at_a_time\[(?!.*relu_1\]|fc|avgpool|layer4)": "layer 4 and each second ReLU stay",
    r"test_production\.py::test_compiled_each_of_all\[5\]": "sites are compiled one at a time in other tests, and all in the sweep",
    r"test_own_models\.py::test_moved_off_and_back\[(?!vit|gpt|bert|t5|mlp)": "one model of each kind stays",
    r"test_own_models\.py::test_compiled_masks_are_eagers\[timm vit\]": "torchvision's ViT stays",
    r"test_export_language\.py::test_ten_steps_compiled_and_stripped\[(t5|llama|bert|gpt2-inductor)": "GPT-2 under aot_eager stays",
    r"test_export_language\.py::test_train_mode_and_gradients_are_the_models\[(t5|llama)\]": "GPT-2 and BERT stay",
    r"test_backend_breaks\.py::test_fasterrcnn_trains_as_by_hand": "32 graphs; tests of two and three graphs stay",
    r"test_compiled\.py::test_five_steps\[vit-(aggressive|budget)": "the setting is tried on the MLP",
    r"test_names_taken\.py::test_every_name_is_the_models_or_refused\[(class|property|method)\]": "the other kinds of attribute stay",
    r"test_resume\.py::test_killed_and_resumed\[inductor\]": "eager stays",
    r"test_export_names\.py::test_the_same_names_and_the_same_function\[vit_b_16\]": "smaller models stay",
    r"test_own_attention\.py::test_compiled\[inductor": "aot_eager stays",
    r"test_own_attention\.py::test_the_mean_over_masks_is_the_attention_without\[(?!layer)": "one way to call attention stays",
    r"test_ten_models\.py::test_one_step\[(vgg|mobile|efficient|swin|convnext)": "the others of the ten stay",
    r"test_backend\.py::test_(sites_masks_penalties|site_names_are).*\[shufflenet\]": "ResNet stays",
    r"test_cost\.py::test_twice_the_model_is_twice_the_work\[(Parts|Whole|Modes)\]": "the other forms stay",
    r"test_contractive\.py::test_4000_projections.*\[attention\]": "the convolution stays",
    r"test_nesting\.py::test_each_is_seen_into\[(.*120|120)": "depth 300 stays",
    r"test_compiled\.py::test_two_graphs_switch_without_a_third": "one module of two graphs is switched in another test",
    r"test_distributed\.py::.*\[inductor": "eager and whole-graph aot_eager stay",
    r"test_backend\.py::test_attached_penalties_have_the_same_gradients\[cells\]": "the other models stay",
    r"test_cost\.py::test_a_model_as_deep_as_the_benchmarks": "a depth of 300 stays in test_nesting.py",
    r"test_trainer_transformers\.py::test_resumed_from_a_checkpoint": "test_resume.py has the same by hand",
    r"test_interrupted\.py::test_where_torch_fx_and_the_changes_begin_and_end": "a sample of all positions stays",
    r"test_sameness\.py::test_cell\[(?!float64).*inductor": "the cells of float64 stay under Inductor, all under aot_eager",
    r"test_export_language\.py::test_train_mode_and_gradients_are_the_models\[bert\]": "GPT-2 stays",
    r"test_export_language\.py::test_own_dropout_seeded_draws_the_same_compiled": "test_own_models.py has a ViT",
    r"test_ten_models\.py::test_(one_step|names_contain_torchvisions)\[(vit_b_16|deeplab|googlenet)": "ResNet and DenseNet stay",
    r"test_trainer_transformers\.py::test_(adapters_of_peft|the_first_gradient_by_hand\[1\])": "one accumulation stays",
    r"test_cost\.py::test_twice_the_model_is_twice_the_work\[Deep\]": "two of the six forms stay",
    r"test_fxpass\.py::test_names_are_the_models\[(densenet|googlenet|deeplab|vit|swin|convnext)": "the smaller models stay",
    r"test_page_selectors\.py::test_ten_selectors_on_a_real_model\[(?!mobilenet)": "one real model stays",
    r"test_repeats\.py::test_no_alarm_at_the_default_sites\[(gpt2|vit)": "BERT and ResNet stay",
    r"test_derivatives\.py::test_compiled_it_is_double_backward_by_hand\[(transformer block|batch-norm conv)": "the MLP stays",
    r"test_compiled_sequences\.py::test_other_sizes_and_strengths_do_not_recompile": "strengths are changed in other compiled tests",
    r"test_same_sites\.py::test_the_backend_and_a_trace\[bert": "DeBERTa stays, whose rule differed",
    r"test_export_names\.py::test_the_same_names_and_the_same_function\[resnet18\]": "the MLP and a model that reads sizes stay",
    r"test_(doctor|recurrent|recurrent_kept|backend_breaks|monitor|control)\.py::test_\w+\[.*inductor": "aot_eager stays",
    r"test_own_dropout\.py::test_compiled_modules\[(?!Dropout-|Alpha).*inductor": "two kinds stay under Inductor, all under aot_eager",
    r"test_compiled\.py::test_masks_are_bit_equal_and_backward_sees_the_forwards\[budget": "the other setting that recomputes stays",
    r"test_own_dropout\.py::test_compiled_is_eager_bit_for_bit\[.*inductor": "two kinds of dropout stay under Inductor in another test",
    r"test_repeats\.py::test_no_alarm_at_the_default_sites\[bert": "ResNet stays",
    r"test_ten_models\.py::test_names_contain_torchvisions\[(densenet|vgg|swin|efficient)": "ResNet and MobileNet stay",
    r"test_ten_models\.py::test_hidden_sites\[(densenet|vgg|deeplab|googlenet|vit)": "the smaller models stay",
    r"test_ten_models\.py::test_one_step\[densenet": "ResNet stays",
    r"test_fxpass\.py::test_names_are_the_models\[(vgg|efficient)": "ResNet and MobileNet stay",
    r"test_whole\.py::test_the_state_dict_is_the_models\[(googlenet|mnasnet)": "the small models, with all that is odd, stay",
    r"test_names_taken\.py::test_every_name_is_the_models_or_refused\[(buffer|submodule)": "parameters and plain attributes stay",
    r"test_cli\.py::test_wrong_(models_and_inputs|regularizers)\[(report|diff|draw)": "one way to load a model; two commands stay",
    r"test_sequences\.py::test_a_layer_tells_its_axis\[(RNN|GRU)-\{'": "the LSTM has all of the options",
    r"test_theanets_cases\.py::test_a_case_differs_on_purpose\[recurrent-norm/(rnn-|gru)": "RNN stays",
    r"test_exported\.py::test_onnx\[True\]": "the rewritten module stays, which has more in it",
    r"test_page\.py::test_nothing_overlaps_and_labels_fit\[resnet50": "the smaller models stay",
    r"test_sameness\.py::test_cell\[(?!float64).*aot_eager.*(recompute_views|aggressive)": "the other settings stay in every dtype",
    r"test_production\.py::test_eager_one_at_a_time\[layer4\.0": "the last block stays, and the last ReLU of others",
    r"test_export_transformer\.py::": "test_stacks.py has an encoder through export",
    r"test_own_attention\.py::test_compiled\[aot_eager-(always|heads|layer with)": "the other forms of attention stay",
    r"test_fuzz\.py::test_a_fault_in_the_engine_is_found\[(a penalty reads|no copy)": "the faults that are found quickly stay",
    r"test_backend\.py::test_(sites_masks_penalties|site_names_are).*\[densenet\]": "ResNet stays",
    r"test_vmap\.py::test_compiled_whole_it_is_eager\[rows\]": "per-sample gradients stay, which have more in them",
    r"test_doctor\.py::test_nothing_is_changed\[(no_grad|autocast)": "inference mode stays",
    r"test_nesting\.py::test_each_is_seen_into\[300-numbers-export": "names through export stay",
    r"test_names_taken\.py::test_compiled_too\[(graphs|lowering)": "one kind of attribute stays",
    r"test_attached\.py::test_compiled_gradients\[(dict|dataclass)": "a tensor and two graphs stay",
    r"test_attached_scale\.py::test_the_scale_is_that_of_the_call_in_one_graph\[.*-module\.compile": "torch.compile stays",
    r"test_forms\.py::test_recomputed_is_the_same_function\[regularizer[01]-settings[12]": "one regularizer has all settings",
    r"test_recurrent\.py::test_lengths_and_batches_do_not_compile_again\[(GRU|RNN)": "LSTM stays",
    r"test_factories\.py::test_by_torch_export_too\[(Viewed|Rows|Moved|Listed|Copied|Column|FromBuffer)": "the others stay",
    r"test_sameness\.py::test_cell\[(bfloat16|float32).*aot_eager.*budget": "the other dtypes stay",
    r"test_doctor\.py::test_aggressive_recomputation_under_inductor": "it is one of two settings in another test, under Inductor, too",
    r"test_randomness_page\.py::test_the_table_says_what_is_measured\[`F\.dropout`": "graphreg's own column stays",
    r"test_compiled_sequences\.py::test_equals_eager_under_inductor$": "aot_eager stays; what is lowered is tested elsewhere",
}


def is_slow(test: str) -> bool:
    """Whether a test, by its id, is one of the sweep."""
    return any(re.search(pattern, test) for pattern in SWEEP)


def unmatched(tests: list[str]) -> list[str]:
    """The patterns that match none of these tests."""
    return [pattern for pattern in SWEEP if not any(re.search(pattern, test) for test in tests)]
