// What only an emulated device can be made to do: to be absent, to be too small. And the emulation itself: what it is
// meant to catch, it catches.
#include <cuda_runtime.h>

#include <catch2/catch.hpp>
#include <limits>

#include "tests/trace_capture/random_model.hpp"
#include "trace_capture/cuda/device.cuh"
#include "trace_capture/cuda_memory.hpp"
#include "trace_capture/decoder.hpp"
#include "trace_capture/device_rows.hpp"
#include "trace_capture/errors.hpp"

namespace kvreplay {
namespace {

using Catch::Contains;

struct Device {
  Device(int n, std::size_t bytes) { emulation::set_device(n, bytes); }
  ~Device() { emulation::set_device(1, std::size_t{1} << 30); }
};

TEST_CASE("cuda errors: no device, too little memory, a head_dim that kernels do not take") {
  ModelConfig config = test::small_config();
  config.head_dim = 16;
  const Model model = test::random_model(config, ElementType::bf16, 1);
  {
    const Device none(0, 0);
    REQUIRE_THROWS_AS(make_cuda_decoder(model, 16), DeviceError);
    REQUIRE_THROWS_WITH(make_cuda_decoder(model, 16), Contains("no CUDA device") && Contains("--device cpu"));
    REQUIRE(!device_pointers_supported());
  }
  REQUIRE(device_pointers_supported());
  REQUIRE_THROWS_WITH(make_cuda_decoder(model, 16, 1), Contains("device 1") && Contains("0 to 0"));
  {
    const Device small(1, std::size_t{33} << 20);
    REQUIRE_THROWS_WITH(make_cuda_decoder(model, 300000),
                        Contains("has 0.03 GiB free") && Contains("needs") && Contains("300000 tokens"));
    REQUIRE_THROWS_AS(make_cuda_decoder(model, 300000), DeviceError);
  }
  REQUIRE_NOTHROW(make_cuda_decoder(model, 16));
  config.head_dim = 20;
  const Model odd = test::random_model(config, ElementType::bf16, 1);
  REQUIRE_THROWS_WITH(make_cuda_decoder(odd, 16), Contains("head_dim 20") && Contains("multiples of 8"));
}

TEST_CASE("cuda rows: strided rows on the device come out dense, head by head") {
  const int n_heads = GENERATE(1, 3, 7), n = GENERATE(1, 4, 9);
  const bool token_major = GENERATE(false, true);
  const std::size_t row = 12, gap = 4;
  const std::int64_t pitch = static_cast<std::int64_t>(row + gap);
  const std::int64_t stride_token = token_major ? pitch * n_heads : pitch;
  const std::int64_t stride_head = token_major ? pitch : pitch * n;
  std::vector<std::byte> host(static_cast<std::size_t>(pitch * n_heads * n));
  for (std::size_t i = 0; i < host.size(); ++i) {
    host[i] = static_cast<std::byte>(i * 31 % 251);
  }
  const cuda::DeviceMemory memory(host.size(), "a test");
  const cuda::OwnStream stream;
  cuda::check(cudaMemcpyAsync(memory.data(), host.data(), host.size(), cudaMemcpyHostToDevice, stream.get()), "up");
  std::vector<std::byte> out(static_cast<std::size_t>(n_heads * n) * row), expected;
  for (int head = 0; head < n_heads; ++head) {
    for (int i = 0; i < n; ++i) {
      const auto from = host.begin() + head * stride_head + i * stride_token;
      expected.insert(expected.end(), from, from + static_cast<std::ptrdiff_t>(row));
    }
  }
  copy_from_device(memory.data(), n_heads, n, stride_head, stride_token, row, stream.get(), out.data());
  REQUIRE(out == expected);
}

TEST_CASE("cuda rows: a host pointer and rows that overlap are refused") {
  std::vector<std::byte> host(64), out(64);
  REQUIRE_THROWS_WITH(copy_from_device(host.data(), 1, 2, 16, 16, 16, nullptr, out.data()), Contains("on_device"));
  const cuda::DeviceMemory memory(64, "a test");
  REQUIRE_THROWS_AS(copy_from_device(memory.data(), 1, 2, 16, 8, 16, nullptr, out.data()), DeviceError);
}

TEST_CASE("cuda memory: page-locked slots are given and taken back") {
  const SlotMemory memory = pinned_memory();
  std::byte* slot = memory.allocate(100);
  cudaPointerAttributes attributes{};
  cuda::check(cudaPointerGetAttributes(&attributes, slot), "looking");
  REQUIRE(attributes.type == cudaMemoryTypeHost);
  memory.release(slot);
}

void lonely_barrier() {
  if (threadIdx.x == 0) {
    __shfl_xor_sync(0xFFFFFFFFU, 1, 1);
  }
}

TEST_CASE("emulated cuda: a missed barrier, late work and fresh memory are noticed") {
  const cuda::OwnStream a, b;
  emulation::enqueue(a.get(), [] { emulation::run_grid(1, 32, 0, lonely_barrier); });
  REQUIRE_THROWS_WITH(a.wait(), Contains("others do not come"));

  int done = 0;
  emulation::enqueue(b.get(), [&] { ++done; });
  REQUIRE(done == 0);
  cuda::Event event;
  event.record(b);
  const cuda::OwnStream c;
  event.hold(c);
  emulation::enqueue(c.get(), [&] { done *= 10; });
  c.wait();
  REQUIRE(done == 10);

  const cuda::DeviceMemory memory(4, "a test");
  REQUIRE(std::isnan(*reinterpret_cast<const float*>(memory.data())));
}

}  // namespace
}  // namespace kvreplay
