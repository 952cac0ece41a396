#include "trace_capture/cli/options.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <boost/program_options.hpp>
#include <charconv>
#include <limits>
#include <sstream>

#include "policies/catalogue.hpp"
#include "policies/errors.hpp"
#include "sim/run.hpp"
#include "trace_capture/json.hpp"

namespace kvreplay {
namespace {

namespace po = boost::program_options;

constexpr const char* kStray = "words without an option";

// Every value is text here and converted below, so that all faults sound alike.
po::options_description description() {
  const auto text = [](const char* name) { return po::value<std::string>()->value_name(name); };
  const auto flag = [] { return po::bool_switch(); };
  po::options_description input("What is decoded (prompt, prompt-file, tokens or prompts)", 100, 60);
  input.add_options()                                                                            //
      ("model", text("DIR"), "a Hugging Face model folder")                                      //
      ("prompt", text("TEXT"), "the prompt; needs the model's tokenizer.json")                   //
      ("prompt-file", text("F"), "the same from a file, to its last byte")                       //
      ("tokens", text("F.json"), "token ids: [ids], or {\"prompt\": [ids], \"decode\": [ids]}")  //
      ("prompts", text("F.jsonl"),
       "one object per line: prompt or tokens, and decode, spans, name where wanted; one "
       "trace each, and --out is a folder")                                                         //
      ("max-new-tokens", text("N"), "tokens to decode after the prompt; the trace has prompt + N")  //
      ("teacher-forced", flag(), "decode the given tokens instead of choosing any")                 //
      ("spans", text("F.json"), "named token ranges: {\"NAME\": [begin, end]}");
  po::options_description choice("How tokens are chosen", 100, 60);
  choice.add_options()                                                                //
      ("temperature", text("T"), "0 (default): the most likely token")                //
      ("top-p", text("P"), "only the most likely tokens that hold this probability")  //
      ("top-k", text("K"), "only the K most likely tokens (default 0: all)")          //
      ("seed", text("S"), "same seed, same tokens (default 0)")                       //
      ("ignore-eos", flag(), "go on after an end-of-sequence token");
  po::options_description stored("What is stored", 100, 60);
  stored.add_options()                                                                                 //
      ("out", text("T.h5|DIR"), "the trace to write; with --prompts, a folder")                        //
      ("layers", text("LIST"), "only these layers, as 0,4-7 (default: all)")                           //
      ("queries", text("WHICH"), "all (default), decode, or window:N (and the last N of the prompt)")  //
      ("dtype", text("TYPE"), "model (default: as its weights), f16, bf16 or f32")                     //
      ("with", text("w_o"), "also the output projection of each layer")                                //
      ("check-steps", text("N"),
       "decode steps whose attention output is stored, so that 'kvreplay verify' can prove "
       "the trace (default 16; 0 = none)")  //
      ("provenance", text("TEXT"), "where model and text come from, and their licences");
  po::options_description machine("How it runs", 100, 60);
  machine.add_options()                                                                                               //
      ("device", text("WHERE"), "cpu (default), cuda or cuda:N")                                                      //
      ("threads", text("N"), "of the CPU (default: all)")                                                             //
      ("stage", text("SIZE"), "host memory between decoder and file (default 256MiB)")                                //
      ("config", text("F.ini"), "a file of these options, one 'name = value' per line; the command line goes first")  //
      ("dry-run", flag(), "say as JSON what would be written, and how many bytes")                                    //
      ("force", flag(), "replace an existing trace")                                                                  //
      ("quiet", flag(), "no estimate, progress or summary")                                                           //
      ("json", flag(), "the summary as one JSON object per trace")                                                    //
      ("help", flag(), "this text")                                                                                   //
      ("version", flag(), "the version");
  po::options_description all;
  all.add(input).add(choice).add(stored).add(machine);
  return all;
}

std::vector<std::string> names(const po::options_description& all) {
  std::vector<std::string> found;
  for (const auto& option : all.options()) {
    found.push_back("--" + option->long_name());
  }
  return found;
}

// The exceptions of program_options as sentences of ours. `where`: "" or the config file with a colon.
[[noreturn]] void refuse(const po::error& error, const po::options_description& all, const std::string& where) {
  const auto dashed = [](std::string name) {
    name.erase(0, name.find_first_not_of('-'));
    return "--" + name;
  };
  if (const auto* unknown = dynamic_cast<const po::unknown_option*>(&error)) {
    const std::string name = dashed(unknown->get_option_name());
    const std::vector<std::string> known = names(all);
    const auto longer =
        std::find_if(known.begin(), known.end(), [&](const auto& full) { return full.starts_with(name); });
    throw ConfigError(fmt::format("{}{} is no option; the nearest is {}; see kvcapture --help", where, name,
                                  longer != known.end() ? *longer : nearest(name, known)));
  }
  if (const auto* many = dynamic_cast<const po::multiple_occurrences*>(&error)) {
    throw ConfigError(where + dashed(many->get_option_name()) + " is given more than once");
  }
  if (const auto* syntax = dynamic_cast<const po::invalid_syntax*>(&error)) {
    const std::string name = dashed(syntax->get_option_name());
    if (syntax->kind() == po::invalid_syntax::missing_parameter ||
        syntax->kind() == po::invalid_syntax::empty_adjacent_parameter) {
      throw ConfigError(where + name + " needs a value; see kvcapture --help");
    }
    if (syntax->kind() == po::invalid_syntax::extra_parameter) {
      throw ConfigError(where + name + " takes no value");
    }
    if (syntax->kind() == po::invalid_syntax::unrecognized_line) {
      throw ConfigError(fmt::format("{}'{}' is not 'name = value'", where, syntax->tokens()));
    }
  }
  if (const auto* value = dynamic_cast<const po::validation_error*>(&error)) {
    throw ConfigError(where + dashed(value->get_option_name()) + ": true or false is expected");
  }
  throw ConfigError(where + error.what());
}

// The values of one parse, converted with the option named in every fault.
class Values {
 public:
  explicit Values(const po::variables_map& map) : map_(map) {}

  bool has(const char* name) const { return map_.count(name) > 0; }
  bool flag(const char* name) const { return map_[name].as<bool>(); }
  std::string text(const char* name, const std::string& fallback = {}) const {
    return has(name) ? map_[name].as<std::string>() : fallback;
  }
  std::uint64_t whole(const char* name, std::uint64_t fallback, std::uint64_t least, std::uint64_t most) const {
    if (!has(name)) {
      return fallback;
    }
    const std::string value = text(name);
    std::uint64_t number = 0;
    const auto [at, error] = std::from_chars(value.data(), value.data() + value.size(), number);
    if (error != std::errc() || at != value.data() + value.size() || number < least || number > most) {
      throw ConfigError(
          fmt::format("--{}: '{}' is not allowed; a whole number from {} to {} is expected", name, value, least, most));
    }
    return number;
  }
  double real(const char* name, double fallback, double above_or_at, double most, bool above) const {
    if (!has(name)) {
      return fallback;
    }
    const std::string value = text(name);
    double number = 0;
    const auto [at, error] = std::from_chars(value.data(), value.data() + value.size(), number);
    const bool low = above ? !(number > above_or_at) : !(number >= above_or_at);
    if (error != std::errc() || at != value.data() + value.size() || low || !(number <= most)) {
      throw ConfigError(fmt::format("--{}: '{}' is not allowed; a number {} {} and at most {} is expected", name, value,
                                    above ? "above" : "from", above_or_at, most));
    }
    return number;
  }

 private:
  const po::variables_map& map_;
};

// The parser takes whatever follows a # for a comment, also in the middle of a prompt, which must not be cut in
// silence.
std::string read_config_file(const std::string& path) {
  const std::string text = read_text(path, std::uint64_t{64} << 20);
  std::istringstream lines(text);
  std::string line;
  for (int number = 1; std::getline(lines, line); ++number) {
    const std::size_t first = line.find_first_not_of(" \t");
    if (first != std::string::npos && line[first] != '#' && line.find('#') != std::string::npos) {
      throw ConfigError(fmt::format(
          "{}:{}: a # begins a comment, and only at the start of a line; a value with # belongs on the command line",
          path, number));
    }
  }
  return text;
}

constexpr std::uint64_t kMaxPos = std::numeric_limits<Pos>::max();

void read_device(const std::string& text, CaptureRequest& request) {
  const std::vector<std::string> devices = {"cpu", "cuda"};
  request.cuda = text.starts_with("cuda");
  if (text == "cpu" || text == "cuda") {
    return;
  }
  if (text.starts_with("cuda:")) {
    const char *begin = text.data() + 5, *end = text.data() + text.size();
    const auto [at, error] = std::from_chars(begin, end, request.device);
    if (error == std::errc() && at == end && request.device >= 0) {
      return;
    }
  }
  throw ConfigError(
      fmt::format("--device: '{}' is none of cpu, cuda and cuda:N; the nearest is '{}'", text, nearest(text, devices)));
}

void read_stored(const Values& values, CaptureRequest& request) {
  StoreOptions& store = request.capture.store;
  if (values.has("layers")) {
    store.layers = parse_integers("--layers", values.text("layers"));
    std::sort(store.layers.begin(), store.layers.end());
    store.layers.erase(std::unique(store.layers.begin(), store.layers.end()), store.layers.end());
  }
  store.queries = QueryChoice::parse(values.text("queries", "all"));
  const std::string dtype = values.text("dtype", "model");
  if (dtype != "model") {
    const std::vector<std::string> allowed = {"model", "f16", "bf16", "f32"};
    if (std::find(allowed.begin(), allowed.end(), dtype) == allowed.end()) {
      throw ConfigError(fmt::format("--dtype: '{}' is none of {}; the nearest is '{}'", dtype, fmt::join(allowed, ", "),
                                    nearest(dtype, allowed)));
    }
    request.element = element_type_of(dtype);
  }
  const std::string with = values.text("with");
  if (values.has("with") && with != "w_o") {
    throw ConfigError("--with: '" + with + "' cannot be stored; w_o can");
  }
  store.w_o = with == "w_o";
  store.check_steps = static_cast<int>(values.whole("check-steps", 16, 0, 1 << 20));
}

void read_sampling(const Values& values, CaptureRequest& request) {
  Sampling& sampling = request.capture.sampling;
  sampling.temperature = values.real("temperature", 0, 0, 1000, false);
  sampling.top_p = values.real("top-p", 1, 0, 1, true);
  sampling.top_k = static_cast<int>(values.whole("top-k", 0, 0, std::numeric_limits<int>::max()));
  sampling.seed = values.whole("seed", 0, 0, std::numeric_limits<std::uint64_t>::max());
  request.capture.ignore_eos = values.flag("ignore-eos");
  for (const char* name : {"top-p", "top-k"}) {
    if (values.has(name) && sampling.temperature == 0) {
      throw ConfigError(fmt::format("--{} has no effect at temperature 0; give --temperature T as well", name));
    }
  }
  if (request.limits.teacher_forced) {
    for (const char* name : {"temperature", "top-p", "top-k"}) {
      if (values.has(name)) {
        throw ConfigError(
            fmt::format("--{} and --teacher-forced exclude each other: given tokens are not chosen", name));
      }
    }
  }
}

CaptureRequest request_of(const Values& values) {
  CaptureRequest request;
  request.help = values.flag("help");
  request.version = values.flag("version");
  if (request.help || request.version) {
    return request;
  }
  for (const char* name : {"model", "out"}) {
    if (values.text(name).empty()) {
      throw ConfigError(fmt::format("--{} is missing; see kvcapture --help", name));
    }
  }
  for (const char* name : {"prompt-file", "tokens", "prompts", "spans", "config"}) {
    if (values.has(name) && values.text(name).empty()) {
      throw ConfigError(fmt::format("--{} needs the name of a file", name));
    }
  }
  request.model = values.text("model");
  request.out = values.text("out");
  int inputs = 0;
  for (const char* name : {"prompt", "prompt-file", "tokens", "prompts"}) {
    inputs += values.has(name) ? 1 : 0;
  }
  if (inputs != 1) {
    throw ConfigError(
        fmt::format("one of --prompt, --prompt-file, --tokens and --prompts is expected, but {} are given",
                    inputs == 0 ? "none" : std::to_string(inputs)));
  }
  if (values.has("prompt")) {
    request.prompt = values.text("prompt");
  }
  request.prompt_file = values.text("prompt-file");
  request.tokens_file = values.text("tokens");
  request.prompts_file = values.text("prompts");
  request.spans_file = values.text("spans");
  if (values.has("spans") && values.has("prompts")) {
    throw ConfigError("--spans belongs to a single prompt; with --prompts each line has its own spans");
  }
  request.limits.teacher_forced = values.flag("teacher-forced");
  if (request.limits.teacher_forced && (values.has("prompt") || values.has("prompt-file"))) {
    throw ConfigError("--teacher-forced needs token ids: give --tokens or --prompts");
  }
  if (values.has("max-new-tokens")) {
    request.limits.max_new_tokens = static_cast<Pos>(values.whole("max-new-tokens", 0, 0, kMaxPos));
  } else if (!request.limits.teacher_forced) {
    throw ConfigError("--max-new-tokens is missing: how many tokens to decode after the prompt");
  }
  read_device(values.text("device", "cpu"), request);
  request.threads = static_cast<int>(values.whole("threads", 0, 1, 1024));
  read_stored(values, request);
  read_sampling(values, request);
  if (values.has("stage")) {
    request.capture.stage_bytes = parse_bytes("--stage", values.text("stage"));
  }
  request.provenance = values.text("provenance");
  request.dry_run = values.flag("dry-run");
  request.force = values.flag("force");
  request.quiet = values.flag("quiet");
  request.json = values.flag("json");
  return request;
}

}  // namespace

std::string help_text() {
  std::ostringstream text;
  text << "kvcapture: decodes a model and writes its queries, keys and values as a trace for kvreplay.\n\n"
          "  kvcapture --model DIR --tokens F.json --max-new-tokens N --out T.h5\n"
       << description()
       << "\nExit codes: 0 done, 2 usage or configuration, 3 trace, 4 device, 1 anything else, 130 interrupted.\n";
  return text.str();
}

CaptureRequest parse_request(const std::vector<std::string>& arguments) {
  const po::options_description all = description();
  const std::vector<std::string> words(arguments.begin() + 1, arguments.end());
  po::variables_map map;
  po::options_description with_stray = all;
  with_stray.add_options()(kStray, po::value<std::vector<std::string>>());
  try {
    // Full names only: an abbreviation in a batch script would change its meaning with the next option.
    const int style = po::command_line_style::unix_style & ~po::command_line_style::allow_guessing;
    po::store(po::command_line_parser(words)
                  .options(with_stray)
                  .positional(po::positional_options_description().add(kStray, -1))
                  .style(style)
                  .run(),
              map);
  } catch (const po::error& error) {
    refuse(error, all, "");
  }
  if (map.count(kStray) > 0) {
    throw ConfigError(fmt::format("'{}' belongs to no option; write for example --model DIR; see kvcapture --help",
                                  map[kStray].as<std::vector<std::string>>().front()));
  }
  // A flag that the command line leaves out must not hide what the file says.
  for (auto at = map.begin(); at != map.end();) {
    at = at->second.defaulted() ? map.erase(at) : std::next(at);
  }
  if (map.count("config") > 0) {
    const std::string path = map["config"].as<std::string>();
    std::istringstream file(read_config_file(path));
    try {
      po::variables_map of_file;
      const auto parsed = po::parse_config_file(file, all);
      po::store(parsed, of_file);
      if (of_file.count("config") > 0) {
        throw ConfigError(path + ": a config file cannot name another one");
      }
      po::store(parsed, map);
    } catch (const po::error& error) {
      refuse(error, all, path + ": ");
    }
  }
  po::store(po::command_line_parser(std::vector<std::string>()).options(all).run(), map);  // defaults of the flags
  return request_of(Values(map));
}

}  // namespace kvreplay
