// JSON files of a model folder, which strangers wrote: bounded in size and depth, every fault a ConfigError that names
// the file.
#pragma once
#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace kvreplay {

enum class Names { last_wins, unique };  // what becomes of a name that an object has twice; `unique` refuses it

// Throws ConfigError if the file cannot be read or is larger than max_bytes.
std::string read_text(const std::filesystem::path& path, std::uint64_t max_bytes);

// For json::parse of any value: refuses what is nested deeper than 64 levels (such a value could not even be shown),
// and names that are there twice where they must be unique.
nlohmann::json::parser_callback_t depth_and_names(const std::string& where, Names names);

// The object that `text` holds. `where` names it in errors.
nlohmann::json parse_object(std::string_view text, const std::string& where, Names names = Names::last_wins);

// A value or a name as a sentence can show it: printable ASCII, shortened.
std::string shown(const nlohmann::json& value);
std::string shown(std::string_view name);

}  // namespace kvreplay
