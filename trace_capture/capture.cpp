#include "trace_capture/capture.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <utility>

#include "policies/errors.hpp"
#include "trace_capture/errors.hpp"
#include "trace_capture/rope.hpp"
#include "traces/errors.hpp"

namespace kvreplay {
namespace {

using Clock = std::chrono::steady_clock;

constexpr float kUnknown = std::numeric_limits<float>::quiet_NaN();

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

TraceInfo trace_info(const Model& model, const RecordPlan& plan, const Sequence& sequence,
                     const CaptureOptions& options) {
  const ModelConfig& config = model.config;
  TraceInfo info;
  info.generator = options.generator;
  info.provenance = options.provenance;
  info.model_name = config.name;
  info.architecture = config.architecture;
  info.config_json = config.json;
  info.weights_hash = model.weights_hash;
  info.dtype = name_of(element_type(model));
  info.n_layers = config.n_layers;
  info.n_heads = config.n_heads;
  info.n_kv_heads = config.n_kv_heads;
  info.group_size = config.group_size();
  info.head_dim = info.v_head_dim = config.head_dim;
  info.attention_scale = config.attention_scale;
  info.qk_norm = config.qk_norm;
  info.sliding_window = config.sliding_window;
  info.prompt_len = sequence.prompt_len();
  info.element = plan.element;
  info.layers = plan.layers;
  info.spans = sequence.spans;

  info.rope.present = true;
  info.rope.style = "half";
  info.rope.rotary_dim = config.head_dim;
  info.rope.theta = config.rope.theta;
  info.rope.scaling_json = config.rope.json;
  info.rope.invertible = rope_is_fixed(config.rope, config.max_positions, plan.capacity);
  const Pos length = info.rope.invertible ? plan.capacity : sequence.prompt_len();
  RopeTable table = rope_table(config.rope, config.head_dim, config.max_positions, length);
  info.rope.inv_freq = std::move(table.inv_freq);
  info.rope.attention_factor = table.attention_factor;
  return info;
}

void write_w_o(const Model& model, const RecordPlan& plan, TraceWriter& writer) {
  std::vector<float> values;
  for (const int layer : plan.layers) {
    const Tensor& o = model.layers[static_cast<std::size_t>(layer)].o;
    values.resize(static_cast<std::size_t>(o.size()));
    if (!widen(o.type, o.data, values)) {
      throw ConfigError(fmt::format("layer {}: the output projection has values that are not finite numbers", layer));
    }
    writer.write_w_o(layer, values);
  }
}

// The passes of one sequence, each with its ids, log-probabilities and pieces told to the recorder.
class Passes {
 public:
  Passes(Decoder& decoder, Recorder& recorder, const Tokenizer* tokenizer, const Watch& watch, Pos total,
         Pos prompt_len)
      : decoder_(decoder),
        recorder_(recorder),
        tokenizer_(tokenizer),
        watch_(watch),
        total_(total),
        prompt_len_(prompt_len) {}

  bool stopped() const { return watch_.stop != nullptr && watch_.stop->load(); }
  Pos done() const { return done_; }

  // Tokens [done(), end) of ids, in passes of at most `block`. What ids has beyond `end` is used for the
  // log-probability of the token after the last pass.
  void known(std::span<const std::int32_t> ids, Pos end, Pos block) {
    while (done_ < end && !stopped()) {
      const Pos n = std::min({end - done_, block, decoder_.max_pass()});
      const auto here = ids.subspan(at(done_), at(n));
      decoder_.pass(here, &recorder_);
      const auto next = ids.subspan(at(done_) + 1, std::min(at(n), ids.size() - at(done_) - 1));
      logprob_.resize(at(n) + 1);
      logprob_[0] = next_logprob_;
      if (!next.empty()) {
        decoder_.log_probabilities(next, std::span(logprob_).subspan(1, next.size()));
      }
      const auto known = std::span(std::as_const(logprob_)).subspan(1, next.size());
      if (!std::all_of(known.begin(), known.end(), [](float value) { return std::isfinite(value); })) {
        throw std::runtime_error(fmt::format(
            "the logits of tokens {} to {} are not all finite: these weights do not compute, or not in this "
            "precision",
            done_, done_ + n - 1));
      }
      next_logprob_ = logprob_[next.size()];
      tell(here, std::span<const float>(logprob_).first(at(n)));
    }
  }

  // Up to n tokens, each chosen from the logits of the one before and then passed. True if it ended at one of eos_ids.
  bool chosen(Pos n, const Sampling& sampling, std::span<const std::int32_t> eos_ids) {
    for (Pos step = 0; step < n && !stopped(); ++step) {
      const Choice choice = decoder_.choose(sampling, static_cast<std::uint64_t>(step));
      decoder_.pass({&choice.id, 1}, &recorder_);
      tell({&choice.id, 1}, {&choice.logprob, 1});
      if (std::find(eos_ids.begin(), eos_ids.end(), choice.id) != eos_ids.end()) {
        return step + 1 < n;
      }
    }
    return false;
  }

 private:
  static std::size_t at(Pos pos) { return static_cast<std::size_t>(pos); }

  void tell(std::span<const std::int32_t> ids, std::span<const float> logprob) {
    pieces_.clear();
    if (tokenizer_ != nullptr) {
      for (const std::int32_t id : ids) {
        pieces_.push_back(id < tokenizer_->vocab_size() ? tokenizer_->piece(id) : std::string());
      }
    }
    recorder_.tokens(ids, logprob, pieces_);
    done_ += static_cast<Pos>(ids.size());
    if (watch_.progress) {
      watch_.progress({done_, total_, prompt_len_, seconds_since(start_), recorder_.rates()});
    }
  }

  Decoder& decoder_;
  Recorder& recorder_;
  const Tokenizer* tokenizer_;
  const Watch& watch_;
  const Pos total_, prompt_len_;
  const Clock::time_point start_ = Clock::now();
  Pos done_ = 0;
  float next_logprob_ = kUnknown;  // of the token after those passed; nothing predicts the first
  std::vector<float> logprob_;     // of a pass and the token after it
  std::vector<std::string> pieces_;
};

void decode(Decoder& decoder, Recorder& recorder, const Sequence& sequence, const Tokenizer* tokenizer,
            const CaptureOptions& options, const ModelConfig& config, const Watch& watch, Captured& captured) {
  std::vector<std::int32_t> ids = sequence.prompt;
  ids.insert(ids.end(), sequence.decode.begin(), sequence.decode.end());
  decoder.reset();
  Passes passes(decoder, recorder, tokenizer, watch, sequence.n_tokens(), sequence.prompt_len());
  const auto start = Clock::now();
  passes.known(ids, sequence.prompt_len(), sequence.prompt_len());
  captured.prefill_seconds = seconds_since(start);
  if (!sequence.decode.empty()) {
    // Where the rotation depends on the length, a decode goes token by token as it would without the recorded text.
    const bool fixed = rope_is_fixed(config.rope, config.max_positions, sequence.n_tokens());
    passes.known(ids, sequence.n_tokens(), fixed ? sequence.n_tokens() : 1);
  } else if (passes.done() == sequence.prompt_len()) {
    captured.eos = passes.chosen(sequence.n_new, options.sampling,
                                 options.ignore_eos ? std::span<const std::int32_t>() : std::span(config.eos_ids));
  }
  captured.decode_seconds = seconds_since(start) - captured.prefill_seconds;
  captured.n_tokens = passes.done();
  captured.interrupted = passes.stopped() && passes.done() < sequence.n_tokens() && !captured.eos;
}

// After a failure: the unfinished file goes if it holds no token, else the sentence says where it is.
std::string keep_part(TraceWriter& writer, const std::filesystem::path& out, const std::string& sentence) {
  if (writer.n_committed() == 0) {
    writer.discard();
    return sentence;
  }
  try {
    const TraceReader still_readable(writer.part_path());
  } catch (
      const TraceError&) {  // a write of its head was torn, as on a full file system that copies what it overwrites
    return fmt::format("{}; {} was being finished then and cannot be read any more", sentence,
                       writer.part_path().string());
  }
  return fmt::format("{}; the first {} tokens are safe in {}, of which 'kvreplay recover {} {}' makes a trace",
                     sentence, writer.n_committed(), writer.part_path().string(), writer.part_path().string(),
                     out.string());
}

}  // namespace

std::size_t piece_bytes(const Sequence& sequence, const Tokenizer* tokenizer) {
  if (tokenizer == nullptr) {
    return 0;
  }
  std::size_t longest = 1;
  const auto consider = [&](std::int32_t id) {
    if (id < tokenizer->vocab_size()) {
      longest = std::max(longest, tokenizer->piece(id).size());
    }
  };
  if (sequence.decode.empty() && sequence.n_new > 0) {  // any token may come
    for (std::int32_t id = 0; id < tokenizer->vocab_size(); ++id) {
      consider(id);
    }
  } else {
    std::for_each(sequence.prompt.begin(), sequence.prompt.end(), consider);
    std::for_each(sequence.decode.begin(), sequence.decode.end(), consider);
  }
  return longest;
}

Captured capture(const Model& model, Decoder& decoder, const Sequence& sequence, const Tokenizer* tokenizer,
                 const CaptureOptions& options, const std::filesystem::path& out, const Watch& watch) {
  const RecordPlan plan = record_plan(model.config, options.store, sequence.prompt_len(), sequence.n_tokens());
  WriterOptions layout;
  layout.queries = plan.queries;
  layout.outputs = plan.outputs;
  layout.logprob = true;
  layout.piece_bytes = piece_bytes(sequence, tokenizer);
  if (options.store.w_o) {
    layout.hidden = model.config.hidden;
    layout.w_o_type = model.layers[0].o.type;
  }
  Captured captured;
  captured.prompt_len = sequence.prompt_len();
  TraceWriter writer(out, trace_info(model, plan, sequence, options), plan.capacity, std::move(layout));
  try {
    if (options.store.w_o) {
      write_w_o(model, plan, writer);
    }
    {
      Recorder recorder(plan, writer,
                        {.stage_bytes = options.stage_bytes, .max_pass = decoder.max_pass(), .memory = options.memory});
      try {
        decode(decoder, recorder, sequence, tokenizer, options, model.config, watch, captured);
        recorder.finish();
      } catch (const std::runtime_error&) {
        recorder.finish();  // what was decoded is kept; a failure of the writer thread would have come first
        throw;
      }
      captured.rates = recorder.rates();
    }
    if (captured.interrupted) {
      captured.n_tokens = writer.n_committed();
      if (captured.n_tokens == 0) {
        writer.discard();
      } else {
        captured.path = writer.part_path();
      }
      return captured;
    }
    writer.close();
  } catch (const ConfigError&) {
    writer.discard();  // it has to be captured anew, otherwise
    throw;
  } catch (const TraceError& error) {
    throw TraceError(keep_part(writer, out, error.what()));
  } catch (const DeviceError& error) {
    throw DeviceError(keep_part(writer, out, error.what()));
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(keep_part(writer, out, error.what()));
  } catch (...) {
    if (writer.n_committed() == 0) {
      writer.discard();
    }
    throw;
  }
  captured.path = out;
  std::error_code ignored;
  captured.file_bytes = std::filesystem::file_size(out, ignored);
  return captured;
}

}  // namespace kvreplay
