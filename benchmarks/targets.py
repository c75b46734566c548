"""Times to reach on an H200, in us with warm inputs, by the name of the case. The README shows these cases."""

from collections.abc import Mapping

TARGETS: Mapping[str, float] = {
    "qkv_norm_rope_append T=1 H 128": 1.6,
    "qkv_norm_rope_append T=16 H 128": 2.2,
    "qkv_norm_rope_append T=128 H 128": 7.0,
    "hc_pre_rms_norm_quant_fp8 T=1 dim 4096": 5.0,
    "hc_pre_rms_norm_quant_fp8 T=128 dim 4096": 7.0,
    "hc_post_pre_rms_norm_quant_fp8 T=1 dim 4096": 5.5,
    "hc_post_pre_rms_norm_quant_fp8 T=1 dim 7168": 6.5,
    "hc_post T=4096 dim 7168": 126.0,
    "csa_compress_append T=1 D 512, a group ends": 1.8,
    "csa_compress_append T=128 D 512, a group ends": 3.0,
    "index_query_fp8 T=1 64 x 128": 1.2,
    "index_query_fp8 T=128 64 x 128": 3.8,
    "index_query_fp4 T=1 64 x 128": 1.2,
    "index_query_fp4 T=128 64 x 128": 3.8,
    "gate_topk T=1 E 256": 1.5,
    "gate_topk T=4096 E 256": 6.0,
    "swiglu_quant_fp8 T=4096 I 2048, 24576 rows": 58.0,
    "quant_fp8 T=4096 dim 4096": 13.0,
    "rms_norm_quant_nvfp4 T=1 dim 7168": 3.5,
    "rms_norm_quant_nvfp4 T=4096 dim 7168": 36.6,  # 133.9 MB at 0.85 of 4.3 TB/s
}
