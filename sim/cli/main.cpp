// kvreplay: parses the command line, maps errors to exit codes. Results on stdout, everything else on stderr.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <exception>
#include <new>

#include "policies/errors.hpp"
#include "sim/cli/exit.hpp"
#include "sim/cli/policies_command.hpp"
#include "sim/cli/report_command.hpp"
#include "sim/cli/run_command.hpp"
#include "sim/cli/trace_commands.hpp"
#include "sim/version.hpp"
#include "traces/errors.hpp"

namespace kvreplay {
namespace {

std::vector<std::string> arguments;

int fail(ExitCode code, const std::string& sentence) {
  fmt::print(stderr, "kvreplay: {}\n", sentence);
  return code;
}

}  // namespace

const std::vector<std::string>& command_line() { return arguments; }

}  // namespace kvreplay

int main(int argc, char** argv) {
  using namespace kvreplay;
  arguments.assign(argv, argv + argc);
  CLI::App app{"Replays KV-cache eviction policies on recorded attention and measures what they lose."};
  app.set_version_flag("--version", fmt::format("kvreplay {} ({}, {})", kVersion, kGitHash, kBuildFlags));
  app.require_subcommand(1);
  app.fallthrough(false);
  add_run_command(app);
  add_policies_command(app);
  add_report_command(app);
  add_trace_commands(app);
  try {
    app.parse(argc, argv);
    return kDone;
  } catch (const CLI::ParseError& e) {
    return e.get_exit_code() == 0 ? app.exit(e) : (app.exit(e, std::cerr, std::cerr), kUsage);
  } catch (const Exit& e) {
    return e.code;
  } catch (const ConfigError& e) {
    return fail(kUsage, e.what());
  } catch (const TraceError& e) {
    return fail(kTrace, e.what());
  } catch (const std::bad_alloc&) {
    return fail(kOther, "out of memory; lower --memory or replay fewer methods at once");
  } catch (const std::exception& e) {
    return fail(kOther, e.what());
  }
}
