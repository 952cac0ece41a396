// Files that are read in one go, and text files of any size that appear under their final names whole or not at all.
#pragma once
#include <filesystem>
#include <string>
#include <string_view>

namespace kvreplay {

// Throws ConfigError: a folder, a file that cannot be opened or read.
std::string read_whole(const std::filesystem::path& path);

class WholeFile {
 public:
  // part: the temporary name, where several processes may write the file; empty: the final name and ".part".
  explicit WholeFile(const std::filesystem::path& path, const std::filesystem::path& part = {});
  ~WholeFile();  // unpublished: leaves nothing behind
  WholeFile(const WholeFile&) = delete;
  WholeFile& operator=(const WholeFile&) = delete;
  void add(std::string_view text);
  void settle();   // all of it is on the disk, not yet under its final name
  void publish();  // settle, rename, fsync of the folder

 private:
  [[noreturn]] void fail(const char* what) const;
  void write(std::string_view text);

  std::filesystem::path path_, part_;
  std::string waiting_;  // what is still to be written, so that small texts cost no call each
  int fd_ = -1;
  bool settled_ = false;
};

}  // namespace kvreplay
