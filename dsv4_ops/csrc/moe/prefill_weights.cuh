// Packed weights on their way to wgmma: what a stage of shared memory holds, and words decoded to bf16, exactly
// (prefill_fold.cuh decodes MXFP4 to E4M3).
//
// E2M1 and E4M3 codes are moved into the exponent and mantissa bits of a bf16, which makes them too small by a power of
// two (2^-126, 2^-120), subnormals included, and multiplied by their scale times that power. UE8M0 scales for which the
// factor overflows (above 2, above 2^7) take a second product, behind a branch that real weights do not take. NVFP4 has
// factors 2^8 smaller; the epilogue makes up for it.
#pragma once

#include <cuda_bf16.h>

#include "common/e4m3_bf16.cuh"
#include "common/number_formats.cuh"
#include "common/ptx_sm90_moe.cuh"
#include "common/ptx_sm90_wgmma.cuh"
#include "common/reduce.cuh"
#include "common/vector.cuh"
#include "moe/order.cuh"
#include "moe/prefill.h"

namespace dsv4 {

constexpr int kConsumers = 256;  // threads of two warpgroups
constexpr int kRowSets = 4;      // rows of a thread: `row` and row + 8 of two matrices

template <MoeFormat kFormat>
struct WeightShape {
  static constexpr bool kFp4 = Order<kFormat>::kFp4;
  static constexpr int kChunk = kFormat == MoeFormat::kDense ? 64 : 128;  // columns of a stage
  static constexpr int kRowBytes = kFp4 ? 64 : 128;                       // that a row has in a stage
  static constexpr int kPieces = kRowBytes / 64;                          // of 16 bytes, that a thread has of a row
  static constexpr int kSteps = kChunk / 16;
  static constexpr int kStepsOfLoad = kFormat == MoeFormat::kDense ? 1 : kSteps / kPieces;
  static constexpr int kStages = kFp4 ? 4 : 3;
  static constexpr bool kFolded = kFormat == MoeFormat::kMxfp4Folded;
  static constexpr int kPanelColumns = kFolded ? 128 : 64;    // of x
  static constexpr int kPanels = kFolded ? 6 : kFp4 ? 7 : 5;  // that are in place or on their way
  // Scales come in 16 bytes a row, with the first of the stages that they serve.
  static constexpr int kScaleBytes = kFormat == MoeFormat::kMxfp4 || kFolded ? 4 : 8;  // of a row and stage
  static constexpr int kScaleSpan = 16 / kScaleBytes;                       // stages
  static constexpr int kScaleBuffers = kFp4 ? kStages : 0;  // as a span may be as short as a stage
  // What the accumulators have to be multiplied by.
  static constexpr float kUnit = kFormat == MoeFormat::kNvfp4 ? 256.0f : 1.0f;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// bf16 with this exponent field, in both halves; NaN for `nan`.
__device__ __forceinline__ uint32_t power_bf16x2(uint32_t field, bool nan = false) {
  return nan ? 0x7FC07FC0u : field * 0x00800080u;
}

// The scales of a thread's rows in a stage, as factors of decoded words.
template <MoeFormat kFormat>
class Factors {
  using Shape = WeightShape<kFormat>;

 public:
  // FP4: from shared memory, [kRowSets][64] rows of 16 bytes, `slot` the thread's first. To be called for the first
  // step of a stage; prepare() for every fourth.
  __device__ __forceinline__ void load(const uint4* scales, int slot, int chunk, int t) {
    const auto* const bytes = reinterpret_cast<const uint8_t*>(scales);
    const int place = chunk % Shape::kScaleSpan * Shape::kScaleBytes;
#pragma unroll
    for (int set = 0; set < kRowSets; ++set) {
      const int row = (set * 64 + slot) * 16 + place;
      codes_[set] = kFormat == MoeFormat::kMxfp4 ? bytes[row + t]
                                                 : *reinterpret_cast<const uint16_t*>(bytes + row + 2 * t);
    }
    find_large();
  }

  // FP8: of two matrices.
  __device__ __forceinline__ void set(uint32_t first, uint32_t second) {
    codes_[0] = codes_[1] = first;
    codes_[2] = codes_[3] = second;
    find_large();
  }

  __device__ __forceinline__ void prepare(int step) {
#pragma unroll
    for (int set = 0; set < kRowSets; ++set) {
      if constexpr (kFormat == MoeFormat::kNvfp4) {
        const float scale = decode_e4m3(codes_[set] >> 2 * step & 0xFFu) * 0x1p118f;
        factors_[set] = pack_bf16x2(scale, scale);
      } else {
        factors_[set] = power_bf16x2(min(codes_[set] + kShift, 254u));
      }
    }
  }

  __device__ __forceinline__ bool large() const { return large_; }
  __device__ __forceinline__ uint32_t factor(int set) const { return factors_[set]; }

  // What is missing where `large`.
  __device__ __forceinline__ uint32_t rest(int set) const {
    const uint32_t beyond = max(codes_[set] + kShift, 254u) - 254u;
    return power_bf16x2(127 + beyond, codes_[set] == 255);
  }

 private:
  static constexpr uint32_t kShift = kFormat == MoeFormat::kFp8 ? 120 : 126;

  __device__ __forceinline__ void find_large() {
    if constexpr (kFormat == MoeFormat::kNvfp4) {
      large_ = false;
    } else {
      const uint32_t most = max(max(codes_[0], codes_[1]), max(codes_[2], codes_[3]));
      large_ = __any_sync(kAllLanes, most + kShift > 254u);
    }
  }

  uint32_t codes_[kRowSets] = {}, factors_[kRowSets] = {};
  bool large_ = false;
};

// A thread's part of a stage that `step` begins with, for each of its rows: a piece; of bf16 the half that a step
// takes, so that no register of an operand under way is loaded.
template <MoeFormat kFormat>
__device__ __forceinline__ void load_weights(uint4 (&pieces)[kRowSets], const uint4 (*stage)[kConsumers], int step) {
  using Shape = WeightShape<kFormat>;
#pragma unroll
  for (int set = 0; set < kRowSets; ++set) {
    const uint4* const piece = stage[set * Shape::kPieces + step * Shape::kPieces / Shape::kSteps] + threadIdx.x;
    if constexpr (kFormat == MoeFormat::kDense) {
      const uint2 half = reinterpret_cast<const uint2*>(piece)[step % 2];
      pieces[set] = {half.x, half.y, 0, 0};
    } else {
      pieces[set] = *piece;
    }
  }
}

template <>
class Factors<MoeFormat::kDense> {
 public:
  __device__ __forceinline__ void prepare(int) {}
  __device__ __forceinline__ bool large() const { return false; }
  __device__ __forceinline__ uint32_t rest(int) const { return 0; }
};

// Codes i and i + 4 of eight E2M1 codes as bf16, each times 2^-126. A product puts the two copies of a code that sign
// and magnitude are taken from in place: it has a pipe of its own, and shifts and logic share one.
__device__ __forceinline__ uint32_t place_e2m1(uint32_t word, int i) {
  const uint32_t codes = (i < 2 ? word : word >> 8) & (i % 2 == 0 ? 0x000F000Fu : 0x00F000F0u);
  return codes * (i % 2 == 0 ? (1u << 12) + (1u << 6) : (1u << 8) + (1u << 2)) & 0x81C081C0u;
}

// The first operand of `step` for the rows of matrix `matrix`, from what a thread loaded of the stage.
template <MoeFormat kFormat>
__device__ __forceinline__ void decode_step(uint32_t (&a)[4], const uint4 (&pieces)[kRowSets], int matrix, int step,
                                            const Factors<kFormat>& factors) {
#pragma unroll
  for (int lower = 0; lower < 2; ++lower) {
    const int set = 2 * matrix + lower;
    const uint32_t words[4] = {pieces[set].x, pieces[set].y, pieces[set].z, pieces[set].w};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t& value = a[lower + 2 * half];
      if constexpr (kFormat == MoeFormat::kDense) {
        value = words[half];
      } else if constexpr (kFormat == MoeFormat::kFp8) {
        value = mul_bf16x2(place_e4m3(words[step % 4], half), factors.factor(set));
      } else {
        value = mul_bf16x2(place_e2m1(words[step / 2], step % 2 * 2 + half), factors.factor(set));
      }
    }
  }
}

// What decode_step leaves out where the factors are `large`.
template <MoeFormat kFormat>
__device__ __forceinline__ void apply_rest(uint32_t (&a)[2][4], const Factors<kFormat>& factors) {
#pragma unroll
  for (int matrix = 0; matrix < 2; ++matrix) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[matrix][i] = mul_bf16x2(a[matrix][i], factors.rest(2 * matrix + i % 2));
  }
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace dsv4
