// What a user asks of kvcapture: one description of the options for the command line and for --config files.
#pragma once
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "trace_capture/capture.hpp"

namespace kvreplay {

struct CaptureRequest {
  bool help = false, version = false;
  std::filesystem::path model, out;
  std::optional<std::string> prompt;  // text; one of these four is there
  std::filesystem::path prompt_file, tokens_file, prompts_file;
  std::filesystem::path spans_file;
  SequenceLimits limits;
  bool cuda = false;
  int device = 0, threads = 0;
  std::optional<ElementType> element;  // without it the model's
  CaptureOptions capture;              // store.element, generator and memory are left to the caller
  std::string provenance;
  bool dry_run = false, force = false, quiet = false, json = false;
};

std::string help_text();

// arguments: as main has them, with the program's name. Reads the --config file; what the command line says goes
// before it. Throws ConfigError: one sentence with the nearest option.
CaptureRequest parse_request(const std::vector<std::string>& arguments);

}  // namespace kvreplay
