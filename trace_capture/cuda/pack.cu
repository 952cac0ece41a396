// Rows of a pass, put where packet.hpp wants them.
#include "trace_capture/cuda/kernels.hpp"
#include "trace_capture/cuda/launch.cuh"

namespace kvreplay::cuda {
namespace {

constexpr int kThreads = 256, kRows = kThreads / 32;

// A warp takes a row: one head of one token of one kind, in one layer.
template <class T, class Stored>
__global__ void __launch_bounds__(kThreads) pack_kernel(const Packing<T> p) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int at = static_cast<int>(blockIdx.x) * kRows + static_cast<int>(threadIdx.x) / 32;
  if (at >= n_packed_rows(p.counts)) {
    return;
  }
  const PackedRow row = packed_row(at, p.counts);
  const std::size_t index = blockIdx.y, dim = static_cast<std::size_t>(p.head_dim);
  const std::size_t n_heads = static_cast<std::size_t>(p.counts.n_heads);
  std::byte* layer_begin = p.packet + index * p.layer_stride;
  if (row.kind == 3) {
    const std::size_t token =
        index * static_cast<std::size_t>(p.pass_n) + static_cast<std::size_t>(p.outputs[row.i] - p.pass_first);
    const float* from = p.out + (token * n_heads + static_cast<std::size_t>(row.head)) * dim;
    float* to = reinterpret_cast<float*>(layer_begin + p.out_at) + static_cast<std::size_t>(row.place) * dim;
    for (int c = lane; c < p.head_dim; c += 32) {
      to[c] = from[c];
    }
  } else {
    const T* from = nullptr;
    if (row.kind == 2) {
      const std::size_t token =
          index * static_cast<std::size_t>(p.pass_n) + static_cast<std::size_t>(p.queries[row.i] - p.pass_first);
      from = p.q + (token * n_heads + static_cast<std::size_t>(row.head)) * dim;
    } else {
      const std::size_t part = static_cast<std::size_t>(p.layers[index]) * 2 + static_cast<std::size_t>(row.kind);
      const std::size_t head =
          part * static_cast<std::size_t>(p.counts.n_kv_heads) + static_cast<std::size_t>(row.head);
      from = p.cache + (head * static_cast<std::size_t>(p.capacity) + static_cast<std::size_t>(p.first + row.i)) * dim;
    }
    const std::size_t part_at = row.kind == 0 ? p.k_at : row.kind == 1 ? p.v_at : p.q_at;
    Stored* to = reinterpret_cast<Stored*>(layer_begin + part_at) + static_cast<std::size_t>(row.place) * dim;
    for (int c = lane; c < p.head_dim; c += 32) {
      to[c] = from_float<Stored>(to_float(from[c]));
    }
  }
}

template <class T, class Stored>
void pack_as(const Packing<T>& packing, Stream stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(n_packed_rows(packing.counts), kRows)),
                  static_cast<unsigned>(packing.n_layers));
  launch(pack_kernel<T, Stored>, grid, kThreads, 0, stream, packing);
}

}  // namespace

template <class T>
void pack(const Packing<T>& packing, ElementType element, Stream stream) {
  switch (element) {
    case ElementType::f16:
      return pack_as<T, F16>(packing, stream);
    case ElementType::bf16:
      return pack_as<T, Bf16>(packing, stream);
    case ElementType::f32:
      return pack_as<T, float>(packing, stream);
  }
}

template void pack<float>(const Packing<float>&, ElementType, Stream);
template void pack<F16>(const Packing<F16>&, ElementType, Stream);
template void pack<Bf16>(const Packing<Bf16>&, ElementType, Stream);

}  // namespace kvreplay::cuda
