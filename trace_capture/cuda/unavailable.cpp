// What a build without CUDA says.
#include "trace_capture/cuda_memory.hpp"
#include "trace_capture/decoder.hpp"
#include "trace_capture/device_rows.hpp"
#include "trace_capture/errors.hpp"

namespace kvreplay {
namespace {

[[noreturn]] void refuse(const char* what) {
  throw DeviceError(std::string(what) +
                    ", but this kvreplay was built without CUDA: use the CPU (--device cpu), or build it where nvcc is "
                    "installed (cmake --preset cuda).");
}

}  // namespace

bool built_with_cuda() { return false; }

std::unique_ptr<Decoder> make_cuda_decoder(const Model&, Pos, int) { refuse("A CUDA device was asked for"); }

SlotMemory pinned_memory() {
  return {[](std::size_t) -> std::byte* { refuse("Page-locked memory was asked for"); }, [](std::byte*) {}};
}

bool device_pointers_supported() { return false; }

void copy_from_device(const void*, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::size_t, void*,
                      std::byte*) {
  refuse("Rows in device memory were handed over");
}

}  // namespace kvreplay
