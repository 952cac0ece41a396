// What needs a real device: Catch2's main, after a look for one (without it the tests are skipped, and say so), and the
// tests that are too large for the emulation.
#define CATCH_CONFIG_RUNNER
#include <catch2/catch.hpp>
#include <filesystem>
#include <iostream>

#include "trace_capture/decoder.hpp"
#include "trace_capture/device_rows.hpp"

namespace kvreplay {
namespace {

// On a device the exact ids depend on the order of sums only where two logits are nearly equal.
TEST_CASE("cuda decoder: the bundled model's greedy tokens are the CPU's") {
  const std::filesystem::path folder = KVREPLAY_FINEWEB_MODEL;
  if (!std::filesystem::exists(folder / "config.json")) {
    WARN("skipped: " + folder.string() + " is not there");
    return;
  }
  const Model model = open_model(folder);
  const Pos prompt = 16, capacity = 80;
  const auto cpu = make_cpu_decoder(model, capacity), cuda = make_cuda_decoder(model, capacity);
  std::vector<std::int32_t> ids;
  for (Pos i = 0; i < prompt; ++i) {
    ids.push_back((17 * i + 5) % model.config.vocab);
  }
  cpu->pass(ids, nullptr);
  cuda->pass(ids, nullptr);
  for (std::uint64_t step = 0; cpu->n_past() < capacity; ++step) {
    const Choice expected = cpu->choose({}, step), found = cuda->choose({}, step);
    if (element_type(model) == ElementType::f32) {
      REQUIRE(found.id == expected.id);
      REQUIRE(found.logprob == Approx(expected.logprob).margin(1e-4));
    }
    const std::int32_t id = expected.id;
    cpu->pass({&id, 1}, nullptr);
    cuda->pass({&id, 1}, nullptr);
  }
  std::vector<float> expected(static_cast<std::size_t>(model.config.vocab)), found(expected.size());
  cpu->logits(0, expected);
  cuda->logits(0, found);
  double difference = 0, square = 0;
  for (std::size_t i = 0; i < found.size(); ++i) {
    difference += std::pow(static_cast<double>(found[i]) - static_cast<double>(expected[i]), 2);
    square += std::pow(static_cast<double>(expected[i]), 2);
  }
  REQUIRE(std::sqrt(difference / square) < (element_type(model) == ElementType::f32 ? 1e-4 : 0.05));
}

}  // namespace
}  // namespace kvreplay

int main(int argc, char** argv) {
  if (!kvreplay::device_pointers_supported()) {
    std::cout << "skipped: no CUDA device\n";
    return 77;
  }
  return Catch::Session().run(argc, argv);
}
