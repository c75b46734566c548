// Prefill: which calls it serves, its workspace, and its launches in order (prefill.h).
#include <algorithm>

#include "common/device.h"
#include "moe/prefill.h"

namespace dsv4 {
namespace {

constexpr int64_t kDecodeTokens = 64;  // rows of so few tokens keep their bits in every batch: decode serves them
constexpr int64_t kMostPairs = int64_t{1} << 30;
constexpr int kMostExperts = 8192;  // counters in shared memory

bool aligned(const void* pointer, int64_t stride, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0 && stride % bytes == 0;
}

int64_t part(int64_t bytes) { return (bytes + 255) / 256 * 256; }

// Parts of the workspace, as bytes from its start. `x` becomes results once gate_up is done.
struct Map {
  int64_t capacity, most_blocks;
  int64_t h, x, row_of_pair, pair_of_row, route, factor, h_factor, blocks, counts, size;

  Map(int64_t pairs, int64_t experts, int64_t d, int64_t inner) {
    const int64_t used = std::min(pairs, experts);  // experts that can have pairs
    capacity = (pairs + used * (kPrefillGrain - 1)) / kPrefillGrain * kPrefillGrain;
    most_blocks = (pairs + used * (kPrefillBlock - 1)) / kPrefillBlock;
    h = 0;
    x = h + part(capacity * inner * 2);
    row_of_pair = x + part(capacity * d * 2);
    pair_of_row = row_of_pair + part(pairs * 4);
    route = pair_of_row + part(capacity * 4);
    factor = route + part(capacity * 4);
    h_factor = factor + part(capacity * 4);
    blocks = h_factor + part(capacity * 4);
    counts = blocks + part(most_blocks * static_cast<int64_t>(sizeof(PrefillBlock)));
    size = counts + part(8);
  }
};

using LaunchProduct = cudaError_t (*)(PrefillStep, const PrefillProduct&, cudaStream_t);

// Of the experts.
LaunchProduct launcher_of(MoeFormat format) {
  switch (format) {
    case MoeFormat::kDense:
      return launch_prefill_dense;
    case MoeFormat::kFp8:
      return launch_prefill_fp8;
    case MoeFormat::kMxfp4Folded:
      return launch_prefill_folded;
    default:
      return launch_prefill_nvfp4;
  }
}

int64_t weight_bytes(MoeFormat format, int64_t columns) {
  return format == MoeFormat::kDense ? 2 * columns : format == MoeFormat::kFp8 ? columns : columns / 2;
}

int64_t scale_bytes(MoeFormat format, int64_t columns) {
  return format == MoeFormat::kFp8 ? columns / 128 : format == MoeFormat::kNvfp4 ? columns / 16 : columns / 32;
}

// The product of rows with matrices [experts, out, k].
PrefillProduct product_of(MoeFormat format, const MoeWeight& first, const MoeWeight& second, int k, int out) {
  PrefillProduct product{};
  const MoeWeight* const weights[2] = {&first, &second};
  for (int i = 0; i < 2; ++i) {
    product.weight[i] = weights[i]->weight;
    product.scale[i] = weights[i]->scale;
    product.global[i] = weights[i]->global;
  }
  product.weight_pitch = weight_bytes(format, k);
  product.scale_pitch = scale_bytes(format, k);
  product.weight_expert = product.weight_pitch * out;
  product.scale_expert = product.scale_pitch * (format == MoeFormat::kFp8 ? out / 128 : out);
  product.k = k;
  product.out = out;
  return product;
}

// Bytes at which what is copied has to start.
bool weights_aligned(MoeFormat format, const MoeWeight& weight) {
  return aligned(weight.weight, 0, 16) && (format == MoeFormat::kDense || aligned(weight.scale, 0, 16));
}

bool x_aligned(MoeFormat format, const void* x, int64_t stride) {
  return aligned(x, stride, format == MoeFormat::kDense ? 16 : format == MoeFormat::kNvfp4 ? 4 : 8);
}

}  // namespace

bool prefill_serves(const Moe& moe) {
  const int64_t pairs = moe.tokens * moe.k;
  if (moe.tokens <= kDecodeTokens || pairs == 0 || pairs > kMostPairs) return false;
  if (moe.experts == 0 || moe.experts > kMostExperts || moe.inner == 0) return false;
  for (const MoeWeight* weight : {&moe.w1, &moe.w3, &moe.w2}) {
    if (!weights_aligned(moe.format, *weight)) return false;
    if (moe.format == MoeFormat::kFp8 && weight->dtype != Dtype::kBf16) return false;  // fp32 scales
  }
  return x_aligned(moe.format, moe.x, moe.x_stride) && on_hopper();
}

int64_t prefill_workspace_size(int64_t pairs, int64_t experts, int64_t d, int64_t inner) {
  return Map(pairs, experts, d, inner).size;
}

int64_t workspace_bytes(const Moe& moe) {
  if (!has_wide_rows(moe) || !prefill_serves(moe)) return workspace_of(moe).size;
  return prefill_workspace_size(moe.tokens * moe.k, moe.experts, moe.d, moe.inner);
}

cudaError_t launch_moe_prefill(const Moe& moe, cudaStream_t stream) {
  const Map map(moe.tokens * moe.k, moe.experts, moe.d, moe.inner);
  uint8_t* const start = moe.workspace;
  const auto ints = [&](int64_t place) { return reinterpret_cast<int*>(start + place); };
  const auto floats = [&](int64_t place) { return reinterpret_cast<float*>(start + place); };
  const bool nvfp4 = moe.format == MoeFormat::kNvfp4;
  const MoeFormat format = moe.format == MoeFormat::kMxfp4 ? MoeFormat::kMxfp4Folded : moe.format;
  const PrefillRows rows{map.capacity,
                         ints(map.row_of_pair),
                         ints(map.pair_of_row),
                         floats(map.route),
                         floats(map.factor),
                         reinterpret_cast<PrefillBlock*>(start + map.blocks),
                         ints(map.counts),
                         map.most_blocks};
  cudaError_t status = launch_prefill_sort(moe, rows, stream);

  const PrefillSpread spread{format,              moe.x,      moe.x_stride, moe.x_scale, moe.x_scale_stride,
                             moe.x_group,         moe.tokens, moe.k,        moe.d,       rows.row_of_pair,
                             start + map.x,       map.capacity};
  if (status == cudaSuccess) status = launch_prefill_spread(spread, stream);

  PrefillProduct gate_up = product_of(format, moe.w1, moe.w3, moe.d, moe.inner);
  gate_up.panels = start + map.x;
  gate_up.rows = rows;
  gate_up.row_factor = nvfp4 ? rows.factor : nullptr;
  gate_up.row_factor_stride = 1;
  gate_up.limit = moe.limit;
  gate_up.h = start + map.h;
  const LaunchProduct launch = launcher_of(format);
  if (status == cudaSuccess) status = launch(PrefillStep::kGateUp, gate_up, stream);

  float* const h_factor = floats(map.h_factor);
  if (status == cudaSuccess && nvfp4) status = launch_prefill_requant(start + map.h, h_factor, rows, moe.inner, stream);

  PrefillProduct down = product_of(format, moe.w2, moe.w2, moe.inner, moe.d);
  down.panels = start + map.h;
  down.rows = rows;
  down.row_factor = nvfp4 ? h_factor : nullptr;
  down.row_factor_stride = 1;
  down.results = start + map.x;
  if (status == cudaSuccess) status = launch(PrefillStep::kDown, down, stream);

  Moe results = moe;  // whose results lie at the same distance from its workspace as everywhere
  results.workspace = start + map.x - workspace_of(moe).results;
  return status == cudaSuccess ? launch_moe_combine(results, stream) : status;
}

bool linear_prefill_serves(const LinearPrefill& linear) {
  const bool wide = linear.k > 0 && linear.k % 128 == 0 && linear.out % 128 == 0 && linear.out > 0;
  if (linear.tokens <= kDecodeTokens || linear.tokens > kMostPairs || !wide) return false;
  if (linear.format != MoeFormat::kMxfp4 && linear.format != MoeFormat::kNvfp4) return false;
  return aligned(linear.weight, linear.weight_pitch, 16) && aligned(linear.weight_scale, 0, 16) &&
         linear.scale_pitch % 4 == 0 && aligned(linear.y, 0, 16) &&
         x_aligned(linear.format, linear.x, linear.x_stride) && on_hopper();
}

int64_t linear_prefill_workspace_size(int64_t tokens, int64_t k) {
  return (tokens + kPrefillGrain - 1) / kPrefillGrain * kPrefillGrain * k * 2;
}

cudaError_t launch_linear_fp4_prefill(const LinearPrefill& linear, cudaStream_t stream) {
  const int64_t capacity = (linear.tokens + kPrefillGrain - 1) / kPrefillGrain * kPrefillGrain;
  const PrefillSpread spread{linear.format, linear.x,       linear.x_stride, linear.x_scale, linear.x_scale_stride,
                             linear.x_group, linear.tokens, 1,               linear.k,       nullptr,
                             linear.workspace, capacity};
  const cudaError_t status = launch_prefill_spread(spread, stream);
  if (status != cudaSuccess) return status;
  const MoeWeight weight{linear.weight, Dtype::kBf16, linear.weight_scale, linear.weight_global};
  PrefillProduct product = product_of(linear.format, weight, weight, linear.k, linear.out);
  product.panels = linear.workspace;
  product.rows.capacity = capacity;
  product.rows.most_blocks = (linear.tokens + kPrefillBlock - 1) / kPrefillBlock;
  product.used_rows = linear.tokens;
  product.weight_pitch = linear.weight_pitch;
  product.scale_pitch = linear.scale_pitch;
  product.row_factor = linear.x_global;
  product.row_factor_stride = linear.x_global_stride;
  product.results = linear.y;
  if (linear.format == MoeFormat::kMxfp4) return launch_prefill_mxfp4(product, stream);
  return launch_prefill_nvfp4(PrefillStep::kDown, product, stream);
}

}  // namespace dsv4
