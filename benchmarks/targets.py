"""Times to reach on an H200, in us, by the name of the case.

TARGETS are of warm inputs; the README's chart shows these cases. COLD_TARGETS are of products whose weights are not in
L2, which is what a decode step finds, cold or streamed (benchmarks/timing.py); the README's table of products shows
those.
"""

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

COLD_TARGETS: Mapping[str, float] = {
    "linear_fp8 T=1 q_a + kv 1536 x 4096": 3.5,
    "linear_fp8 T=1 q_b 32768 x 1024": 9.0,
    "linear_fp8 T=64 q_b 32768 x 1024": 12.0,
    "linear_fp8 T=1 wo_b 4096 x 8192": 9.0,
    "linear_fp8 T=64 wo_b 4096 x 8192": 12.0,
    "linear_fp8 T=1 q_b 65536 x 1536": 25.0,
    "linear_fp8 T=1 wo_b 7168 x 16384": 29.0,
    "grouped_linear_w8a16 T=1 wo_a 8 x 1024 x 4096": 9.0,
    "grouped_linear_w8a16 T=64 wo_a 8 x 1024 x 4096": 12.0,
    "grouped_linear_w8a16 T=1 wo_a 16 x 1024 x 4096": 16.5,
    "grouped_linear_fp8 T=1 wo_a 8 x 1024 x 4096": 9.0,
    "grouped_linear_fp8 T=1 wo_a 16 x 1024 x 4096": 16.5,
    "moe_mxfp4 T=1 Flash E 256, 6 read": 25.0,
    "moe_mxfp4 T=1 Pro E 384, 6 read": 56.0,
    "moe_nvfp4 T=1 Flash E 256, 6 read": 27.0,
    "moe_nvfp4 T=1 Pro E 384, 6 read": 60.0,
    "moe_mxfp4 T=64 Flash E 32, 32 read": 140.0,
    "moe_mxfp4 T=64 Pro E 48, 48 read": 400.0,
    "moe_mxfp4 T=1024 Flash E 32, 32 read": 650.0,
    # 90 % of DeepGEMM's rate
    "linear_fp8 T=4096 q_b 32768 x 1024": 245.7,
    "linear_fp8 T=4096 wo_b 4096 x 8192": 236.2,
    "linear_fp8 T=4096 shared w1 + w3 4096 x 4096": 124.6,
    "linear_fp8 T=4096 shared w2 4096 x 2048": 60.7,
    "linear_fp8 T=4096 q_b 65536 x 1536": 779.7,
    "linear_fp8 T=4096 wo_b 7168 x 16384": 846.6,
    "linear_fp8 T=4096 shared w1 + w3 6144 x 7168": 319.7,
    "linear_fp8 T=4096 shared w2 7168 x 3072": 163.3,
}
