"""The public names of fi_core: adding one is a decision, removing one breaks somebody."""

import inspect

import fi_core

SNAPSHOT = """
Anything ArgumentError AttentionSpec BackendInfo Batch Between Capacity CapacityError Case Condition Cost DrawKeys EXACT FiError
FilterParams FusedRope IndexCheckError KVCache KernelEntry KernelRegistry LayerArgs LayoutError LinearScaling Llama3Scaling
LogprobsOut OneOf Operation PackedMask PenaltyParams Plan PluginError PluginStatus Request RopeConfig RopeTable Rule Selection
Settings SettingsError ShadowMismatchError SharedPrefixes SubsetOf Target TokenHistory Tolerance Trial UnknownBackendError
UnsupportedError YarnScaling add_rmsnorm append_kv attention backends copy_pages explain filter_logits find_shared_prefixes
gelu_mul hookimpl logprobs lse_base2 merge_states penalize_logits plan record_tokens rmsnorm rope sample silu_mul target_of
top_k use verify_chain verify_tree
"""


def test_exported_names():
    assert sorted(fi_core.__all__) == sorted(SNAPSHOT.split())


def test_every_exported_name_exists_and_is_documented():
    for name in fi_core.__all__:
        value = getattr(fi_core, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), name
