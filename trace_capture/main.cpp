// kvcapture: checks a request, says what it will cost, captures one trace per prompt, maps errors to exit codes.
#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <csignal>
#include <exception>
#include <limits>
#include <memory>
#include <new>
#include <nlohmann/json.hpp>
#include <set>

#include "policies/errors.hpp"
#include "sim/cli/exit.hpp"
#include "sim/cli/stop.hpp"
#include "sim/version.hpp"
#include "trace_capture/cli/options.hpp"
#include "trace_capture/cli/progress.hpp"
#include "trace_capture/cuda_memory.hpp"
#include "trace_capture/errors.hpp"
#include "traces/errors.hpp"

namespace kvreplay {
namespace {

namespace fs = std::filesystem;
using nlohmann::ordered_json;

int fail(ExitCode code, const std::string& sentence) {
  say(fmt::format("kvcapture: {}\n", sentence));
  return code;
}

std::string dumped(const ordered_json& json) {
  return json.dump(-1, ' ', false, ordered_json::error_handler_t::replace);
}

std::vector<Prompt> prompts_of(const CaptureRequest& request) {
  if (!request.prompts_file.empty()) {
    return read_prompts(request.prompts_file);
  }
  Prompt prompt;
  if (!request.tokens_file.empty()) {
    prompt = read_tokens(request.tokens_file);
  } else if (request.prompt) {
    prompt.where = "--prompt";
    prompt.text = *request.prompt;
  } else {
    prompt.where = request.prompt_file.string();
    prompt.text = read_prompt_text(request.prompt_file);
  }
  if (!request.spans_file.empty()) {
    if (!prompt.spans.empty()) {
      throw ConfigError("spans are in " + prompt.where + " and in --spans; leave one out");
    }
    prompt.spans = read_spans(request.spans_file);
  }
  return {prompt};
}

// The model's tokenizer: required where a prompt is text; else it only names the tokens, and may be missing.
std::unique_ptr<Tokenizer> tokenizer_of(const CaptureRequest& request, const std::vector<Prompt>& prompts) {
  bool needed = false;
  for (const Prompt& prompt : prompts) {
    needed = needed || prompt.text.has_value();
  }
  try {
    if (needed || fs::exists(request.model / "tokenizer.json")) {
      return std::make_unique<Tokenizer>(request.model);
    }
  } catch (const ConfigError& error) {
    if (needed) {
      throw;
    }
    if (!request.quiet) {
      say(fmt::format("kvcapture: the trace will have no pieces of text: {}\n", error.what()));
    }
  }
  return nullptr;
}

void check_output(const fs::path& path, bool force) {
  std::error_code error;
  if (fs::is_directory(path, error)) {
    throw ConfigError(path.string() + " is a folder, but the name of a trace file is expected");
  }
  if (fs::exists(path, error) && !fs::is_regular_file(path, error)) {
    throw ConfigError(path.string() + " is no regular file, so a trace cannot take its place");
  }
  if (force) {
    return;
  }
  if (fs::exists(path, error)) {
    throw ConfigError(path.string() + " exists already; name another file, or use --force to replace it");
  }
  const std::string part = path.string() + ".part";
  if (fs::exists(part, error)) {
    throw ConfigError(
        fmt::format("{} is what another capture is writing, or what an interrupted one left; save it with 'kvreplay "
                    "recover {} {}', or use "
                    "--force to replace it",
                    part, part, path.string()));
  }
}

void check_folder(const fs::path& folder, const fs::path& out) {
  std::error_code error;
  if (!fs::is_directory(folder, error)) {
    throw ConfigError(folder.string() + " is not a folder, so " + out.string() + " cannot be written there");
  }
  if (::access(folder.c_str(), W_OK | X_OK) != 0) {
    throw ConfigError(folder.string() + " cannot be written to, so " + out.string() + " cannot be made there");
  }
}

fs::path parent_of(const fs::path& path) { return path.has_parent_path() ? path.parent_path() : fs::path("."); }

// Where each trace goes. A folder for many is made later, if it is not there.
std::vector<fs::path> outputs_of(const CaptureRequest& request, const std::vector<Sequence>& sequences) {
  if (request.prompts_file.empty()) {
    check_folder(parent_of(request.out), request.out);
    check_output(request.out, request.force);
    return {request.out};
  }
  std::error_code error;
  const fs::path folder = request.out.has_filename() ? request.out : request.out.parent_path();
  if (fs::exists(folder, error)) {
    check_folder(folder, request.out);
  } else {
    check_folder(parent_of(folder), request.out);
  }
  std::vector<fs::path> outputs;
  for (const Sequence& sequence : sequences) {
    outputs.push_back(folder / (sequence.name + ".h5"));
    check_output(outputs.back(), request.force);
  }
  return outputs;
}

// What will be written, and what --queries window:64 would make of it.
struct Cost {
  ordered_json json;
  std::uint64_t bytes = 0, windowed = 0, free = 0;
};

constexpr Pos kSuggestedWindow = 64;

Cost cost_of(const CaptureRequest& request, const Model& model, const Tokenizer* tokenizer,
             const std::vector<Sequence>& sequences, const std::vector<fs::path>& outputs) {
  const StoreOptions& store = request.capture.store;
  StoreOptions windowed = store;
  windowed.queries = {QueryChoice::Kind::window, kSuggestedWindow};
  Cost cost;
  cost.json["traces"] = ordered_json::array();
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    const Sequence& s = sequences[i];
    const std::size_t piece = piece_bytes(s, tokenizer);
    const RecordPlan plan = record_plan(model.config, store, s.prompt_len(), s.n_tokens());
    const std::uint64_t bytes = trace_bytes(model, store, s.prompt_len(), s.n_tokens(), piece);
    const std::uint64_t less = std::min(bytes, trace_bytes(model, windowed, s.prompt_len(), s.n_tokens(), piece));
    cost.bytes += bytes;
    cost.windowed += less;
    cost.json["traces"].push_back({{"out", outputs[i].string()},
                                   {"prompt_len", s.prompt_len()},
                                   {"n_tokens", s.n_tokens()},
                                   {"n_queries", plan.queries.size()},
                                   {"n_check", plan.outputs.size()},
                                   {"bytes", bytes},
                                   {"bytes_window_64", less}});
  }
  cost.free = free_bytes(parent_of(outputs.front()));
  cost.json["model"] = model.config.name;
  cost.json["layers"] = record_plan(model.config, store, 1, 1).layers;
  cost.json["dtype"] = name_of(store.element);
  cost.json["bytes"] = cost.bytes;
  cost.json["bytes_window_64"] = cost.windowed;
  cost.json["free_bytes"] = cost.free;
  cost.json["fits"] = cost.bytes <= cost.free;
  return cost;
}

std::string saving(const Cost& cost) {
  return cost.windowed < cost.bytes
             ? fmt::format("; --queries window:{} would take {}", kSuggestedWindow, bytes_text(cost.windowed))
             : "";
}

// Who made the file and how, as the format wants it.
std::string generator(const CaptureRequest& request, const std::vector<std::string>& arguments,
                      const std::string& device) {
  const Sampling& sampling = request.capture.sampling;
  ordered_json json;
  json["tool"] = "kvcapture";
  json["version"] = kVersion;
  json["git"] = kGitHash;
  json["argv"] = arguments;
  json["device"] = device;
  json["decode"] = request.limits.teacher_forced ? "teacher-forced" : "generated";
  if (!request.limits.teacher_forced) {
    json["sampling"] = {{"temperature", sampling.temperature},
                        {"top_p", sampling.top_p},
                        {"top_k", sampling.top_k},
                        {"seed", sampling.seed}};
    json["ignore_eos"] = request.capture.ignore_eos;
  }
  return dumped(json);
}

std::string provenance(const CaptureRequest& request) {
  const std::string how =
      request.limits.teacher_forced ? "Teacher-forced: the tokens of the decode phase were given, not generated."
      : request.capture.sampling.temperature > 0 ? "The tokens of the decode phase were sampled from the model."
                                                 : "The tokens of the decode phase were generated greedily.";
  return request.provenance.empty() ? how : request.provenance + " " + how;
}

void say_done(const CaptureRequest& request, const Captured& done, const fs::path& out) {
  const Pos n_new = done.n_tokens - std::min(done.prompt_len, done.n_tokens);
  const double seconds = done.prefill_seconds + done.decode_seconds;
  if (request.json) {
    ordered_json json = {{"trace", out.string()},
                         {"complete", !done.interrupted},
                         {"n_tokens", done.n_tokens},
                         {"prompt_len", done.prompt_len},
                         {"ended_at_eos", done.eos},
                         {"prefill_seconds", done.prefill_seconds},
                         {"decode_seconds", done.decode_seconds},
                         {"stall_seconds", done.rates.stall_seconds},
                         {"write_seconds", done.rates.write_seconds},
                         {"bytes_written", done.rates.bytes},
                         {"file_bytes", done.file_bytes}};
    if (done.interrupted) {
      json["part"] = done.path.string();
    }
    fmt::print("{}\n", dumped(json));
  } else if (!request.quiet && !done.interrupted) {
    fmt::print("{}: {} tokens ({} prompt, {} decode{}), {}, prefill {:.1f} s, decode {:.1f} s, {}\n", out.string(),
               done.n_tokens, done.prompt_len, n_new, done.eos ? ", ended at EOS" : "", bytes_text(done.file_bytes),
               done.prefill_seconds, done.decode_seconds, rates_text(done.n_tokens, seconds, done.rates));
  }
  std::fflush(stdout);
}

// Where a standard stream is closed, the next file that is opened would get its number, and a trace would receive what
// is said to the user. /dev/null for reading takes the number; writing to it fails as to the closed stream.
void hold_standard_streams() {
  for (int fd = ::open("/dev/null", O_RDONLY); fd >= 0; fd = ::open("/dev/null", O_RDONLY)) {
    if (fd > STDERR_FILENO) {
      ::close(fd);
      return;
    }
  }
}

int run(const std::vector<std::string>& arguments) {
  CaptureRequest request = parse_request(arguments);
  if (request.help) {
    fmt::print("{}", help_text());
    return kDone;
  }
  if (request.version) {
    fmt::print("kvcapture {} ({}, {}, cuda={})\n", kVersion, kGitHash, kBuildFlags, built_with_cuda() ? "ON" : "OFF");
    return kDone;
  }
  const std::vector<Prompt> prompts = prompts_of(request);
  const Model model = open_model(request.model);
  request.capture.store.element = request.element.value_or(element_type(model));
  const std::unique_ptr<Tokenizer> tokenizer = tokenizer_of(request, prompts);
  std::vector<Sequence> sequences;
  Pos longest = 0;
  for (const Prompt& prompt : prompts) {
    sequences.push_back(sequence_of(prompt, model.config, tokenizer.get(), request.limits));
    longest = std::max(longest, sequences.back().n_tokens());
  }
  const std::vector<fs::path> outputs = outputs_of(request, sequences);
  const Cost cost = cost_of(request, model, tokenizer.get(), sequences, outputs);
  if (request.dry_run) {
    fmt::print("{}\n", cost.json.dump(2, ' ', false, ordered_json::error_handler_t::replace));
    return kDone;
  }
  if (cost.bytes > cost.free) {
    throw ConfigError(fmt::format("{} would be written, but {} has {} free{}", bytes_text(cost.bytes),
                                  parent_of(outputs.front()).string(), bytes_text(cost.free), saving(cost)));
  }
  if (!request.quiet) {
    say(fmt::format("kvcapture: {} to write, {} free{}\n", bytes_text(cost.bytes), bytes_text(cost.free),
                    saving(cost)));
  }

  stop_on_signals();
  std::signal(SIGXFSZ, SIG_IGN);  // a file size limit is then an error of write, and a sentence
  const std::unique_ptr<Decoder> decoder = request.cuda ? make_cuda_decoder(model, longest, request.device)
                                                        : make_cpu_decoder(model, longest, request.threads);
  if (request.cuda) {
    request.capture.memory = pinned_memory();
  }
  request.capture.generator = generator(request, arguments, decoder->name());
  request.capture.provenance = provenance(request);
  if (!request.prompts_file.empty()) {
    std::error_code error;
    fs::create_directory(parent_of(outputs.front()), error);
    check_folder(parent_of(outputs.front()), outputs.front());
  }
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    Captured done;
    check_output(outputs[i], request.force);  // loading the weights takes long enough for another capture to end
    {
      CaptureLine line;
      Watch watch{&stop_requested, {}};
      if (!request.quiet) {
        const std::string name = outputs[i].filename().string();
        watch.progress = [&line, name](const CaptureProgress& progress) { line.at(name, progress); };
      }
      done = capture(model, *decoder, sequences[i], tokenizer.get(), request.capture, outputs[i], watch);
    }
    say_done(request, done, outputs[i]);
    if (done.interrupted) {
      const std::string part = done.path.string();
      return fail(kInterrupted,
                  part.empty()
                      ? fmt::format("interrupted before the first token of {} was stored", outputs[i].string())
                      : fmt::format("interrupted; the first {} of {} tokens are in {}, of which 'kvreplay recover "
                                    "{} {}' makes a trace",
                                    done.n_tokens, sequences[i].n_tokens(), part, part, outputs[i].string()));
    }
    if (stop_requested && i + 1 < sequences.size()) {
      return fail(kInterrupted, fmt::format("interrupted; {} of {} traces are written", i + 1, sequences.size()));
    }
  }
  return kDone;
}

}  // namespace
}  // namespace kvreplay

int main(int argc, char** argv) {
  using namespace kvreplay;  // NOLINT(google-build-using-namespace): ours, in main alone
  hold_standard_streams();
  try {
    const int code = run(std::vector<std::string>(argv, argv + argc));
    if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0) {
      return fail(kOther, "standard output cannot be written");
    }
    return code;
  } catch (const ConfigError& e) {
    return fail(kUsage, e.what());
  } catch (const TraceError& e) {
    return fail(kTrace, e.what());
  } catch (const DeviceError& e) {
    return fail(kDevice, e.what());
  } catch (const std::bad_alloc&) {
    return fail(kOther, "out of memory; lower --stage, or capture a shorter sequence");
  } catch (const std::exception& e) {
    return fail(kOther, e.what());
  }
}
