#include "trace_capture/cuda/device.cuh"
#include "trace_capture/cuda_memory.hpp"

namespace kvreplay {

SlotMemory pinned_memory() {
  return {[](std::size_t bytes) { return cuda::PinnedMemory(bytes).release(); },
          [](std::byte* slot) { cudaFreeHost(slot); }};
}

}  // namespace kvreplay
