"""What ``make sweep`` runs and ``make test`` does not: cases that take long and say little beside those that stay, each with the reason."""

from __future__ import annotations

import re

# A pattern of test ids (``re.search``), and what makes the case one of the sweep.
SWEEP = {
    r"test_production\.py::test_eager_one_at_a_time\[(?!.*relu_1\]|fc|avgpool|layer4)": "layer 4 and each second ReLU stay",
    r"test_production\.py::test_compiled_each_of_all\[5\]": "sites are compiled one at a time in other tests, and all in the sweep",
    r"test_own_models\.py::test_moved_off_and_back\[(?!vgg11|vit|gpt|bert|t5|mlp)": "one model of each kind stays",
    r"test_own_models\.py::test_compiled_masks_are_eagers\[timm vit\]": "torchvision's ViT stays",
    r"test_export_language\.py::test_ten_steps_compiled_and_stripped\[(t5|llama|bert)\]": "GPT-2 stays",
    r"test_export_language\.py::test_train_mode_and_gradients_are_the_models\[(t5|llama)\]": "GPT-2 and BERT stay",
    r"test_backend_breaks\.py::test_fasterrcnn_trains_as_by_hand": "32 graphs; tests of two and three graphs stay",
    r"test_compiled\.py::test_five_steps\[vit-aggressive": "the setting is tried on the MLP",
    r"test_names_taken\.py::test_every_name_is_the_models_or_refused\[(class|property|method)\]": "the other kinds of attribute stay",
    r"test_resume\.py::test_killed_and_resumed\[inductor\]": "eager stays",
    r"test_export_names\.py::test_the_same_names_and_the_same_function\[vit_b_16\]": "smaller models stay",
    r"test_export_transformer\.py::test_the_names_of_the_inner_sites": "the names of its layers are tested on tiny models",
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
    r"test_export_transformer\.py::test_training_compiled": "test_compiled.py has a ViT",
    r"test_ten_models\.py::test_(one_step|names_contain_torchvisions)\[(vit_b_16|deeplab|googlenet)": "ResNet and DenseNet stay",
    r"test_trainer_transformers\.py::test_(adapters_of_peft|the_first_gradient_by_hand\[1\])": "one accumulation stays",
    r"test_cost\.py::test_twice_the_model_is_twice_the_work\[Deep\]": "two of the six forms stay",
    r"test_fxpass\.py::test_names_are_the_models\[(densenet|googlenet|deeplab|vit|swin|convnext)": "the smaller models stay",
    r"test_page_selectors\.py::test_ten_selectors_on_a_real_model\[(?!mobilenet)": "one real model stays",
    r"test_page_selectors\.py::test_random_selectors_are_understood_as_by_the_library\[10000\]": "the first thousand of them stay",
    r"test_repeats\.py::test_no_alarm_at_the_default_sites\[(gpt2|vit)": "BERT and ResNet stay",
    r"test_derivatives\.py::test_compiled_it_is_double_backward_by_hand\[transformer block\]": "the convolution and the MLP stay",
    r"test_compiled_sequences\.py::test_other_sizes_and_strengths_do_not_recompile": "strengths are changed in other compiled tests",
}


def is_slow(test: str) -> bool:
    """Whether a test, by its id, is one of the sweep."""
    return any(re.search(pattern, test) for pattern in SWEEP)
