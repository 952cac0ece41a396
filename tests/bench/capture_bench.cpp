// What capturing costs on a GPU: decode and prefill with and without it, beside what the hardware allows. Random
// weights of a given shape, one host buffer behind every matrix. Prints one table; hf_capture.py prints the same for
// transformers with hooks.
#include <cuda_runtime.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <functional>
#include <random>
#include <stdexcept>

#include "trace_capture/cuda/device.cuh"
#include "trace_capture/cuda_memory.hpp"
#include "trace_capture/decoder.hpp"
#include "trace_capture/recorder.hpp"
#include "traces/writer.hpp"

namespace {

using namespace kvreplay;
using Clock = std::chrono::steady_clock;

struct Shape {
  int layers = 32, hidden = 4096, intermediate = 14336, heads = 32, kv_heads = 8, head_dim = 128, vocab = 128256;
};

double seconds(const std::function<void()>& work) {
  const auto start = Clock::now();
  work();
  return std::chrono::duration<double>(Clock::now() - start).count();
}

Model random_model(const Shape& shape) {
  Model model;
  ModelConfig& c = model.config;
  c.name = "random";
  c.architecture = "LlamaForCausalLM";
  c.n_layers = shape.layers;
  c.hidden = shape.hidden;
  c.intermediate = shape.intermediate;
  c.n_heads = shape.heads;
  c.n_kv_heads = shape.kv_heads;
  c.head_dim = shape.head_dim;
  c.vocab = shape.vocab;
  c.max_positions = 131072;
  c.norm_eps = 1e-5;
  c.attention_scale = 1 / std::sqrt(shape.head_dim);
  c.sliding_window.assign(static_cast<std::size_t>(shape.layers), 0);
  c.rope.theta = 500000;

  const std::int64_t hidden = c.hidden, rows = std::max<std::int64_t>(c.vocab + 1, c.intermediate);
  auto buffer = std::make_shared<std::vector<std::byte>>(static_cast<std::size_t>(rows * hidden) * 2);
  std::vector<float> some(1 << 20);
  std::mt19937 generator(1);
  std::normal_distribution<float> normal(0, 0.02F);
  for (float& value : some) {
    value = normal(generator);
  }
  const std::size_t piece = some.size() * 2;
  narrow(ElementType::bf16, some, buffer->data());
  for (std::size_t at = piece; at < buffer->size(); at += piece) {
    std::memcpy(buffer->data() + at, buffer->data(), std::min(piece, buffer->size() - at));
  }
  const auto matrix = [&](std::int64_t out, std::int64_t in, std::int64_t first_row = 0) {
    return Tensor{buffer->data() + first_row * hidden * 2, ElementType::bf16, {out, in}};
  };
  const std::int64_t q_width = std::int64_t{c.n_heads} * c.head_dim, kv_width = std::int64_t{c.n_kv_heads} * c.head_dim;
  model.embedding = matrix(c.vocab, hidden);
  model.head = matrix(c.vocab, hidden, 1);  // another place, so that it counts as another matrix
  model.final_norm = matrix(hidden, 1);
  for (int i = 0; i < c.n_layers; ++i) {
    LayerWeights w;
    w.attention_norm = w.mlp_norm = matrix(hidden, 1);
    w.q = matrix(q_width, hidden);
    w.k = w.v = matrix(kv_width, hidden);
    w.o = matrix(hidden, q_width);
    w.gate = w.up = matrix(c.intermediate, hidden);
    w.down = matrix(hidden, c.intermediate);
    model.layers.push_back(w);
  }
  model.storage = buffer;
  return model;
}

// Of a copy within the device, reading and writing: bytes per second.
double copy_bandwidth() {
  const std::size_t bytes = std::size_t{2} << 30;
  const int repeats = 20;
  const cuda::DeviceMemory from(bytes, "the bench"), to(bytes, "the bench");
  const cuda::OwnStream stream;
  const auto copy = [&](int n) {
    for (int i = 0; i < n; ++i) {
      cuda::check(cudaMemcpyAsync(to.data(), from.data(), bytes, cudaMemcpyDeviceToDevice, stream.get()), "copying");
    }
    stream.wait();
  };
  copy(2);
  return 2.0 * static_cast<double>(bytes) * repeats / seconds([&] { copy(repeats); });
}

// Of a new file in the folder, synced: bytes per second.
double write_rate(const std::filesystem::path& folder) {
  const std::filesystem::path path = folder / "write_rate";
  const std::vector<char> block(std::size_t{16} << 20, 'x');
  const int blocks = 256;
  const int file = ::open(path.c_str(), O_CREAT | O_TRUNC | O_WRONLY, 0600);
  if (file < 0) {
    throw std::runtime_error(path.string() + " cannot be written");
  }
  const double time = seconds([&] {
    for (int i = 0; i < blocks; ++i) {
      if (::write(file, block.data(), block.size()) != static_cast<ssize_t>(block.size())) {
        throw std::runtime_error(path.string() + " cannot be written");
      }
    }
    ::fdatasync(file);
  });
  ::close(file);
  std::filesystem::remove(path);
  return static_cast<double>(block.size()) * blocks / time;
}

struct Times {
  double prefill = 0;          // until the first token is chosen, s
  double prefill_written = 0;  // until the prompt is in the file, s
  double step = 0;             // s
  double stall = 0;            // of decode, s
  double bytes = 0;            // of the prompt
};

Times run(Decoder& decoder, const ModelConfig& config, Pos prompt, Pos steps, const std::filesystem::path& folder,
          bool capture) {
  const Pos capacity = prompt + steps;
  RecordPlan plan;
  plan.n_heads = config.n_heads;
  plan.n_kv_heads = config.n_kv_heads;
  plan.head_dim = config.head_dim;
  plan.element = ElementType::bf16;
  plan.capacity = capacity;
  plan.queries = queries_all(capacity);
  for (int layer = 0; layer < config.n_layers; ++layer) {
    plan.layers.push_back(layer);
  }
  std::unique_ptr<TraceWriter> writer;
  std::unique_ptr<Recorder> recorder;
  if (capture) {
    TraceInfo meta;
    meta.model_name = config.name;
    meta.n_layers = config.n_layers;
    meta.n_heads = config.n_heads;
    meta.n_kv_heads = config.n_kv_heads;
    meta.head_dim = meta.v_head_dim = config.head_dim;
    meta.attention_scale = config.attention_scale;
    meta.sliding_window = config.sliding_window;
    meta.element = plan.element;
    meta.layers = plan.layers;
    meta.prompt_len = prompt;
    WriterOptions writing;
    writing.queries = plan.queries;
    writer = std::make_unique<TraceWriter>(folder / "capture_bench.h5", meta, capacity, writing);
    Recorder::Options options;
    options.max_pass = decoder.max_pass();
    options.stage_bytes = std::size_t{1} << 30;
    options.memory = pinned_memory();
    recorder = std::make_unique<Recorder>(plan, *writer, options);
  }
  Times times;
  std::vector<std::int32_t> ids(static_cast<std::size_t>(prompt));
  for (std::size_t i = 0; i < ids.size(); ++i) {
    ids[i] = static_cast<std::int32_t>(i * 7919 % static_cast<std::size_t>(config.vocab));
  }
  decoder.reset();
  Choice choice;
  const auto pass = [&](std::span<const std::int32_t> now) {
    decoder.pass(now, recorder.get());
    if (recorder) {
      recorder->tokens(now, {});
    }
  };
  times.prefill_written = seconds([&] {
    times.prefill = seconds([&] {
      for (Pos at = 0; at < prompt; at += decoder.max_pass()) {
        pass(std::span(ids).subspan(static_cast<std::size_t>(at),
                                    static_cast<std::size_t>(std::min(decoder.max_pass(), prompt - at))));
      }
      choice = decoder.choose({}, 0);
    });
    if (recorder) {
      recorder->finish();
    }
  });
  const double stall = recorder ? recorder->rates().stall_seconds : 0;
  times.bytes = recorder ? static_cast<double>(recorder->rates().bytes) : 0;
  times.step = seconds([&] {
                 for (Pos step = 0; step < steps; ++step) {
                   const std::int32_t id = choice.id;
                   pass({&id, 1});
                   choice = decoder.choose({}, static_cast<std::uint64_t>(step) + 1);
                 }
               }) /
               steps;
  if (recorder) {
    recorder->finish();
    times.stall = recorder->rates().stall_seconds - stall;
    recorder.reset();
    writer->discard();
  }
  return times;
}

void row(const char* what, const std::string& value, const std::string& goal = "") {
  fmt::print("{:<58}{:>16}  {}\n", what, value, goal);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    CLI::App app{"Measures capturing on a CUDA device"};
    Shape shape;
    Pos prompt = 8192, steps = 256;
    std::string out = ".";
    int repeats = 3;
    app.add_option("--layers", shape.layers, "layers; the rest is Llama-3.1-8B unless told otherwise");
    app.add_option("--hidden", shape.hidden);
    app.add_option("--intermediate", shape.intermediate);
    app.add_option("--heads", shape.heads);
    app.add_option("--kv-heads", shape.kv_heads);
    app.add_option("--head-dim", shape.head_dim);
    app.add_option("--vocab", shape.vocab);
    app.add_option("--prompt", prompt);
    app.add_option("--steps", steps);
    app.add_option("--repeat", repeats, "each measurement; the fastest counts");
    app.add_option("--out", out, "folder on the disk that traces would go to");
    CLI11_PARSE(app, argc, argv);

    const double bandwidth = copy_bandwidth(), disk = write_rate(out);
    const Model model = random_model(shape);
    const auto decoder = make_cuda_decoder(model, prompt + steps);
    run(*decoder, model.config, prompt, 8, out, false);  // warm
    Times without, with;
    for (int i = 0; i < repeats; ++i) {
      for (const bool capture : {false, true}) {
        const Times now = run(*decoder, model.config, prompt, steps, out, capture);
        Times& best = capture ? with : without;
        const bool first = i == 0;
        best.prefill = first ? now.prefill : std::min(best.prefill, now.prefill);
        best.prefill_written = first ? now.prefill_written : std::min(best.prefill_written, now.prefill_written);
        best.step = first ? now.step : std::min(best.step, now.step);
        best.stall = first ? now.stall : std::min(best.stall, now.stall);
        best.bytes = now.bytes;
      }
    }
    const auto& c = model.config;
    const double layer = static_cast<double>(c.hidden) *
                         (2.0 * c.n_heads * c.head_dim + 2.0 * c.n_kv_heads * c.head_dim + 3.0 * c.intermediate);
    const double weights = 2 * (c.n_layers * layer + static_cast<double>(c.vocab) * c.hidden);  // read in a step, bytes
    const double read_time = weights / bandwidth, allowed = std::max(without.prefill / 0.85, with.bytes / disk);

    row("device", decoder->name());
    row("prompt, decode steps", fmt::format("{}, {}", prompt, steps));
    row("copy bandwidth of the device (read + write), GB/s", fmt::format("{:.0f}", bandwidth / 1e9));
    row("write rate of --out, MB/s", fmt::format("{:.0f}", disk / 1e6));
    row("time to read the weights once, ms", fmt::format("{:.2f}", read_time * 1e3));
    row("decode step without capture, ms", fmt::format("{:.2f}", without.step * 1e3));
    row("  in times of reading the weights", fmt::format("{:.2f}", without.step / read_time), "goal <= 1.5");
    row("decode step with capture, ms", fmt::format("{:.2f}", with.step * 1e3));
    row("  decode speed with capture / without", fmt::format("{:.3f}", without.step / with.step), "goal >= 0.90");
    row("  of it waiting for the writer, s", fmt::format("{:.3f}", with.stall));
    row("prefill without capture, s", fmt::format("{:.3f}", without.prefill));
    row("prefill with capture until the first token, s", fmt::format("{:.3f}", with.prefill));
    row("prefill with capture until all is in the file, s", fmt::format("{:.3f}", with.prefill_written));
    row("  bytes of the prompt, GB", fmt::format("{:.2f}", with.bytes / 1e9));
    row("  in times of max(without / 0.85, bytes / write rate)", fmt::format("{:.2f}", with.prefill_written / allowed),
        "goal <= 1.0");
    return 0;
  } catch (const std::exception& error) {
    fmt::print(stderr, "capture_bench: {}\n", error.what());
    return 1;
  }
}
