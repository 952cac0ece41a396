#include "sim/cli/trace_commands.hpp"

#include <fmt/format.h>

#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <CLI/Option.hpp>
#include <algorithm>
#include <charconv>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "policies/errors.hpp"
#include "sim/version.hpp"
#include "traces/hdf5.hpp"
#include "traces/import.hpp"
#include "traces/info.hpp"
#include "traces/recover.hpp"
#include "traces/repack.hpp"
#include "traces/synth.hpp"
#include "traces/verify.hpp"

namespace kvreplay {
namespace {

// The library says std::invalid_argument for a bad request, since it does not know of the command
// line.
template <typename Work>
void run(Work&& work) {
  try {
    work();
  } catch (const std::invalid_argument& error) {
    throw ConfigError(error.what());
  } catch (const hdf5::StorageError& error) {
    throw TraceError(error.what());
  }
}

struct Output {
  std::string path;
  bool force = false;
};

void add_output(CLI::App& command, Output& output, const char* name = "out") {
  command.add_option(name, output.path, "the trace to write")->required();
  command.add_flag("--force", output.force, "replace an existing file");
}

void check_output(const Output& output, const std::string& input = {}) {
  const std::filesystem::path path = output.path;
  const std::filesystem::path folder = path.has_parent_path() ? path.parent_path() : std::filesystem::path(".");
  std::error_code error;
  if (!std::filesystem::is_directory(folder, error)) {
    throw ConfigError(folder.string() + " is not a folder, so " + output.path + " cannot be written there");
  }
  if (std::filesystem::is_directory(path, error)) {
    throw ConfigError(output.path + " is a folder, but the name of a trace file is expected");
  }
  if (std::filesystem::exists(path, error) && !output.force) {
    throw ConfigError(output.path + " exists already; name another file, or use --force to replace it");
  }
  if (!input.empty() && std::filesystem::equivalent(input, path, error)) {
    throw ConfigError(output.path + " is the input itself; name another file");
  }
}

// "0,4-7" -> 0 4 5 6 7
std::vector<int> parse_layers(const std::string& text) {
  std::vector<int> layers;
  const char* at = text.data();
  const char* const end = at + text.size();
  const auto number = [&](int& value) {
    const auto [next, error] = std::from_chars(at, end, value);
    at = next;
    return error == std::errc() && value >= 0 && value < 65536;
  };
  while (at < end) {
    int first = 0;
    bool good = number(first);
    int last = first;
    if (good && at < end && *at == '-') {
      ++at;
      good = number(last) && last >= first;
    }
    if (!good || (at < end && *at++ != ',')) {
      throw ConfigError("layers '" + text + "' cannot be read; numbers and ranges like 0,4-7 are expected");
    }
    for (int layer = first; layer <= last; ++layer) {
      layers.push_back(layer);
    }
  }
  return layers;
}

Profile parse_profile(const std::string& name) {
  if (name == "working") {
    return Profile::working;
  }
  if (name == "archive") {
    return Profile::archive;
  }
  throw ConfigError("profile '" + name + "' is unknown; allowed are working and archive");
}

// "needle=120:134"
Span parse_span(const std::string& text) {
  // The last '=': a name may have one.
  const std::size_t equals = text.rfind('=');
  const auto refuse = [&] { throw ConfigError("--span '" + text + "' cannot be read; NAME=BEGIN:END is expected"); };
  if (equals == std::string::npos || equals == 0) {
    refuse();
  }
  Span span{text.substr(0, equals)};
  const char* const end = text.data() + text.size();
  const auto first = std::from_chars(text.data() + equals + 1, end, span.begin);
  if (first.ec != std::errc() || first.ptr == end || *first.ptr != ':') {
    refuse();
  }
  const auto last = std::from_chars(first.ptr + 1, end, span.end);
  if (last.ec != std::errc() || last.ptr != end) {
    refuse();
  }
  return span;
}

void add_spans(CLI::App& command, std::vector<Span>& spans) {
  command
      .add_option_function<std::vector<std::string>>(
          "--span",
          [&spans](const std::vector<std::string>& texts) {
            spans.clear();
            std::transform(texts.begin(), texts.end(), std::back_inserter(spans), parse_span);
          },
          "name tokens BEGIN to END (END not among them), as needle=120:134; can be repeated")
      ->type_name("NAME=BEGIN:END")
      ->expected(1)
      ->allow_extra_args(false)  // else it takes the positional arguments
      ->take_all();
}

// Who made the file, as the format wants it.
std::string generator(const CLI::App& command) {
  nlohmann::ordered_json json;
  json["tool"] = "kvreplay " + command.get_name();
  json["version"] = kVersion;
  json["git"] = kGitHash;
  json["argv"] = {"kvreplay", command.get_name()};
  std::vector<const CLI::Option*> seen;
  for (const CLI::Option* option : command.parse_order()) {
    if (std::find(seen.begin(), seen.end(), option) != seen.end()) {
      continue;
    }
    seen.push_back(option);
    if (!option->get_positional()) {
      json["argv"].push_back(option->get_name());
      if (option->get_items_expected_max() == 0) {
        continue;  // a flag
      }
    }
    for (const std::string& result : option->results()) {
      json["argv"].push_back(option->get_positional() ? std::filesystem::path(result).filename().string() : result);
    }
  }
  return json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

void add_info(CLI::App& app) {
  struct Options {
    std::vector<std::string> traces;
    bool json = false;
  };
  CLI::App* command = app.add_subcommand("info", "Say what a trace holds");
  const auto o = std::make_shared<Options>();
  command->add_option("traces", o->traces, "trace files")->required();
  command->add_flag("--json", o->json, "one JSON object per trace");
  command->callback([o] {
    run([&] {
      for (std::size_t i = 0; i < o->traces.size(); ++i) {
        const TraceReader trace(o->traces[i]);
        fmt::print("{}{}", i > 0 && !o->json ? "\n" : "", o->json ? info_json(trace) + "\n" : info_text(trace));
      }
    });
  });
}

void add_verify(CLI::App& app) {
  CLI::App* command = app.add_subcommand("verify", "Check hashes, recompute stored outputs, weigh the rotation");
  const auto traces = std::make_shared<std::vector<std::string>>();
  command->add_option("traces", *traces, "trace files")->required();
  command->callback([traces] {
    run([&] {
      std::string failed;
      for (const std::string& path : *traces) {
        const TraceReader trace(path);
        const VerifyReport report = verify(trace);
        fmt::print("{}\n{}", path, report.text());
        if (failed.empty() && !report.failures.empty()) {
          failed = path + ": " + report.failures.front();
        }
      }
      if (!failed.empty()) {
        throw TraceError(failed);
      }
    });
  });
}

void add_recover(CLI::App& app) {
  struct Options {
    std::string in;
    Output out;
  };
  CLI::App* command = app.add_subcommand("recover", "Make an interrupted capture a whole trace");
  const auto o = std::make_shared<Options>();
  command->add_option("in", o->in, "what the capture left, usually NAME.h5.part")->required();
  add_output(*command, o->out);
  command->callback([o] {
    run([&] {
      check_output(o->out, o->in);
      fmt::print("{} tokens recovered to {}\n", recover(o->in, o->out.path), o->out.path);
    });
  });
}

void add_repack(CLI::App& app) {
  struct Options {
    std::string in, profile;
    Output out;
    RepackOptions repack;
  };
  CLI::App* command = app.add_subcommand("repack", "Rewrite a trace in the other profile, or with named spans");
  const auto o = std::make_shared<Options>();
  command->add_option("in", o->in, "a trace")->required();
  add_output(*command, o->out);
  command->add_option("--profile", o->profile, "working (contiguous, fast) or archive (compressed)")->required();
  command->add_option("--chunk-tokens", o->repack.archive.chunk_tokens, "tokens per chunk of an archive")
      ->capture_default_str();
  command->add_option("--deflate", o->repack.archive.deflate, "compression of an archive, 1 to 9")
      ->capture_default_str();
  add_spans(*command, o->repack.spans);
  command->callback([o] {
    run([&] {
      o->repack.profile = parse_profile(o->profile);
      check_output(o->out, o->in);
      repack(o->in, o->out.path, o->repack);
    });
  });
}

void add_import(CLI::App& app) {
  struct Options {
    std::string in, dtype, layers, profile = "working";
    Output out;
    ImportOptions import;
  };
  CLI::App* command = app.add_subcommand("import", "Make a trace from the arrays of an .npz file");
  const auto o = std::make_shared<Options>();
  ImportOptions& import = o->import;
  command->add_option("in", o->in, "an .npz file with token_ids and q{l}, k{l}, v{l} per layer number l")->required();
  add_output(*command, o->out);
  command->add_option("--prompt-len", import.prompt_len, "leading tokens that are the prompt")->required();
  command->add_option("--attention-scale", import.attention_scale, "factor of q k^T before the softmax")->required();
  command->add_option("--rope-theta", import.rope_theta, "base of the rotary frequencies (none: not rotated)");
  command->add_option("--rope-style", import.rope_style, "half or interleaved")->capture_default_str();
  command->add_option("--rotary-dim", import.rotary_dim, "rotated channels (default: head_dim)");
  command->add_option("--n-layers", import.n_layers, "layers of the model (default: the last one in the file + 1)");
  command->add_option("--dtype", o->dtype, "f16, bf16 or f32 (default: as in the file)");
  command->add_option("--tokens", import.n_tokens, "only the first so many tokens");
  command->add_option("--layers", o->layers, "only these layers, e.g. 0,4-7");
  command->add_option("--logit-softcap", import.logit_softcap, "soft cap of the logits (0 = none)");
  command->add_option("--sliding-window", import.sliding_window, "attention window of every layer (0 = none)");
  command->add_flag("--qk-norm", import.qk_norm, "the model normalises q and k");
  command->add_option("--model-name", import.model_name, "name of the model");
  command->add_option("--architecture", import.architecture, "its architecture");
  command->add_option("--provenance", import.provenance, "where the data come from and under which licence");
  add_spans(*command, import.spans);
  command->add_option("--profile", o->profile, "working or archive")->capture_default_str();
  command->add_option("--chunk-tokens", import.archive.chunk_tokens, "tokens per chunk of an archive")
      ->capture_default_str();
  command->add_option("--deflate", import.archive.deflate, "compression of an archive, 1 to 9")->capture_default_str();
  command->callback([o, command] {
    run([&] {
      ImportOptions& options = o->import;
      options.profile = parse_profile(o->profile);
      options.layers = parse_layers(o->layers);
      if (!o->dtype.empty()) {
        options.dtype = element_type_of(o->dtype);
      }
      options.generator = generator(*command);
      check_output(o->out, o->in);
      import_npz(o->in, o->out.path, options);
    });
  });
}

void add_synth(CLI::App& app) {
  struct Options {
    std::string dtype, profile = "working";
    Output out;
    SynthOptions synth;
  };
  CLI::App* command =
      app.add_subcommand("synth", "Make a trace out of numbers, for tests of scale (never as evidence)");
  const auto o = std::make_shared<Options>();
  SynthOptions& synth = o->synth;
  o->dtype = name_of(synth.element);
  add_output(*command, o->out);
  command->add_option("--tokens", synth.n_tokens, "length")->capture_default_str();
  command->add_option("--prompt-len", synth.prompt_len, "leading tokens that are the prompt")->capture_default_str();
  command->add_option("--n-layers", synth.n_layers, "layers")->capture_default_str();
  command->add_option("--heads", synth.n_heads, "query heads")->capture_default_str();
  command->add_option("--kv-heads", synth.n_kv_heads, "KV heads")->capture_default_str();
  command->add_option("--head-dim", synth.head_dim, "width of a head")->capture_default_str();
  command->add_option("--dtype", o->dtype, "f16, bf16 or f32")->capture_default_str();
  command->add_option("--rope-theta", synth.theta, "base of the rotary frequencies")->capture_default_str();
  command->add_option("--rope-style", synth.style, "half or interleaved")->capture_default_str();
  command->add_option("--sinks", synth.sinks, "leading tokens that every query attends to")->capture_default_str();
  command->add_option("--queries", synth.queries, "all, decode or window:N")->capture_default_str();
  command->add_option("--hidden", synth.hidden, "rows of w_o (0 = none)")->capture_default_str();
  command->add_option("--seed", synth.seed, "same seed, same bytes")->capture_default_str();
  command->add_option("--profile", o->profile, "working or archive")->capture_default_str();
  command->callback([o, command] {
    run([&] {
      o->synth.element = element_type_of(o->dtype);
      o->synth.profile = parse_profile(o->profile);
      o->synth.generator = generator(*command);
      check_output(o->out);
      synthesize(o->out.path, o->synth);
    });
  });
}

}  // namespace

void add_trace_commands(CLI::App& app) {
  add_info(app);
  add_verify(app);
  add_recover(app);
  add_repack(app);
  add_import(app);
  add_synth(app);
}

}  // namespace kvreplay
