// csa_ and index_compress_append of one token a sequence in groups of 4 that overlap: the decode step of the released
// models. The bits are those of compress_append.cu, where the formula stands; here fewer steps depend on each other.
//
// A CTA of 128 threads owns a sequence. A thread pools kDim / 128 neighbouring channels: four for KV, one for index
// keys, so that four warps share the exponentials. It finishes four channels, which for index keys one warp does.
//
// What a step reads follows from its position. Before the wait the position is guessed, the parameters of that step are
// loaded, and what it reads of the state comes to L2. After the wait the token, the state's rows and the position are
// loaded together, and again if the guess was wrong. The token's slot of the state is none of those that its group is
// pooled from: it is written at once.
//
// Shared memory: the pooled channels (512 bytes, index keys) or the warps' sums of squares (16 bytes, KV).
//
// Floor: one read from L2 and one write for three tokens of four. The fourth pools 28 KB (KV) at the 64 bytes a clock
// of one SM, and has the latency of a softmax, a sum over the CTA and a maximum over 16 (index keys: 32) lanes.
#include "common/divisor.cuh"
#include "common/launch.cuh"
#include "compressor/entry.cuh"

namespace dsv4 {
namespace {

constexpr int kThreads = 128;
constexpr int kRatio = 4;
constexpr int kLine = 128 / sizeof(float);  // of L2

// Where the step of a position reads a thread's channels.
template <int kDim>
struct Step {
  static constexpr int kWidth = 2 * kDim;   // of kv and of score
  static constexpr int kSlot = 2 * kWidth;  // of the state, from one slot to the next

  int position;
  const float* ape;
  const float* turns;     // row of the rope table, if the step completes a group
  const float* previous;  // row 0 of the group before, and of this one
  const float* own;
  const int32_t* page;  // may lie past the table if the position is a wrong guess
  bool has_page;

  __device__ __forceinline__ Step(const Compressor& c, Divisor by_page, const float* state, int column, int position_)
      : position(position_) {
    const int group = position / kRatio, parity = group % 2, page_index = by_page.divide(group);
    ape = c.ape + position % kRatio * kWidth + column;
    turns = rope_row(c.rope.table, c.rope.dim, group * kRatio);
    previous = state + (1 - parity) * kRatio * kSlot;
    own = state + parity * kRatio * kSlot + kDim;
    page = c.pool.table + blockIdx.x * c.pool.table_stride + page_index;
    has_page = page_index < c.pool.max_pages;
  }

  __device__ __forceinline__ bool completes_group() const { return position % kRatio == kRatio - 1; }

  // function(row, its kv) for the seven rows of a group that the state keeps.
  template <typename Function>
  __device__ __forceinline__ void for_kept_rows(Function function) const {
#pragma unroll
    for (int row = 0; row < kRatio; ++row) function(row, previous + row * kSlot);
#pragma unroll
    for (int row = 0; row < kRatio - 1; ++row) function(kRatio + row, own + row * kSlot);
  }
};

template <EntryForm kForm, int kDim>
__global__ void __launch_bounds__(kThreads) compress_token_kernel(const Compressor c, const Divisor by_page) {
  using T = EntryElement<kForm>;
  constexpr int kCount = kDim / kThreads, kWidth = Step<kDim>::kWidth, kSlot = Step<kDim>::kSlot;
  constexpr int kSlots = 2 * kRatio, kLast = kSlots - 1;
  __shared__ float4 shared[kCount == 1 ? kWarp : 1];
  const int64_t sequence = blockIdx.x;
  const int column = threadIdx.x * kCount;  // that this thread pools
  const int quad = threadIdx.x * kQuad;     // that it finishes
  const int first_rotated = quad < kDim ? quad - (kDim - c.rope.dim) : -kQuad;
  float* const state = c.state + sequence * (kSlots * kSlot) + column;
  const float* const kv = c.kv + sequence * c.kv_stride + column;
  const float* const score = c.score + sequence * c.score_stride + column;
  const int32_t* const position_address = c.rope.positions + sequence * c.rope.stride;

  // 1. Parameters of the model, those of a position by a guess.
  float weights[kQuad] = {}, bias[2][kCount];
  float2 turns[kQuad / 2];
  const auto load_parameters = [&](const Step<kDim>& step) {
    load_floats(step.ape, bias[0]);
    load_floats(step.ape + kDim, bias[1]);
    if (step.completes_group()) load_turns<kQuad>(step.turns, first_rotated, turns);
  };
  Step<kDim> step(c, by_page, state, column, guess_position(c.rope, position_address));
  if (quad < kDim) load_weights(c, quad, weights);
  load_parameters(step);
  if (column % kLine == 0 && step.completes_group()) {
    step.for_kept_rows([](int, const float* row) {
      ptx::prefetch_l2(row);
      ptx::prefetch_l2(row + kWidth);
    });
  }
  ptx::wait_for_predecessors();
  ptx::launch_dependents();

  // 2. All reads.
  float kvs[kSlots][kCount], scores[kSlots][kCount];  // rows of the group before, then of this one
  float first_kv[kCount], first_score[kCount];        // of the token, for the group after its own
  load_floats(kv, first_kv);
  load_floats(score, first_score);
  load_floats(kv + kDim, kvs[kLast]);
  load_floats(score + kDim, scores[kLast]);
  int32_t page = 0;
  int actual;
  while (true) {
    if (step.completes_group()) {
      step.for_kept_rows([&](int row, const float* from) {
        load_floats(from, kvs[row]);
        load_floats(from + kWidth, scores[row]);
      });
      if (step.has_page) page = *step.page;
    }
    __syncwarp();  // the position is not looked at, and waited for, before all else is on its way
    actual = ptx::load_relaxed(position_address);
    if (max(actual, 0) == step.position) break;
    step = Step<kDim>(c, by_page, state, column, max(actual, 0));
    load_parameters(step);
  }
  if (actual < 0) return;

  // 3. The token -> the state.
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    first_score[k] += bias[0][k];
    scores[kLast][k] += bias[1][k];
  }
  float* const slot = state + step.position % kSlots * kSlot;
  store_floats(slot, first_kv);
  store_floats(slot + kDim, kvs[kLast]);
  store_floats(slot + kWidth, first_score);
  store_floats(slot + kWidth + kDim, scores[kLast]);
  if (!step.completes_group()) return;

  // 4. The entry of the group that it completes.
  const int group = step.position / kRatio;
  if (group == 0) {  // no group before: rows that weigh nothing
#pragma unroll
    for (int row = 0; row < kRatio; ++row) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) kvs[row][k] = 0.0f, scores[row][k] = -INFINITY;
    }
  }
  const Softmax<kCount> softmax(kvs, scores);
  const int slot_of_page = group - by_page.divide(group) * c.pool.page_size;
  const Entry entry{c.pool.data + page * c.pool.page_stride, c.pool.page_size, slot_of_page};
  float values[kQuad], sum;
  if constexpr (kCount == kQuad) {
    softmax.mean(values);
    round_all_to<T>(values);
    sum = sum_warps<kThreads / kWarp>(sum_of_squares(values), &shared[0].x);
  } else {
    float pooled[1];
    softmax.mean(pooled);
    (&shared[0].x)[threadIdx.x] = pooled[0];
    __syncthreads();
    if (threadIdx.x >= kWarp) return;
    load_floats(&shared[threadIdx.x].x, values);
    round_all_to<T>(values);
    sum = sum_lanes(sum_of_squares(values));
  }
  const float scale = inverse_rms_of<kDim>(sum, kDim, c.eps);
  finish_entry<kForm>(entry, kDim, c.rope.dim, quad, scale, weights, turns, values, true);
}

template <EntryForm kForm, int kDim>
cudaError_t launch(const Compressor& c, cudaStream_t stream) {
  const Launch at{dim3(c.sequences), dim3(kThreads), stream};
  return launch_kernel(compress_token_kernel<kForm, kDim>, at, c, Divisor(c.pool.page_size));
}

}  // namespace

cudaError_t launch_compress_token(const Compressor& c, EntryForm form, cudaStream_t stream) {
  switch (form) {
    case EntryForm::kKv: return launch<EntryForm::kKv, 512>(c, stream);
    case EntryForm::kIndexFp8: return launch<EntryForm::kIndexFp8, 128>(c, stream);
    case EntryForm::kIndexFp4: return launch<EntryForm::kIndexFp4, 128>(c, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace dsv4
