#include "sim/whole_file.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <fstream>
#include <stdexcept>
#include <system_error>

#include "policies/errors.hpp"

namespace kvreplay {
namespace {

constexpr std::size_t kPiece = std::size_t{1} << 20;

}  // namespace

std::string read_whole(const std::filesystem::path& path) {
  if (std::error_code error; std::filesystem::is_directory(path, error)) {
    throw ConfigError(path.string() + ": is a folder, but a file is expected");
  }
  std::ifstream in(path, std::ios::binary);
  if (!in) {
    throw ConfigError(path.string() + ": cannot be opened: " + std::generic_category().message(errno));
  }
  std::string text;
  for (char block[1 << 16]; in.read(block, sizeof block), in.gcount() > 0;) {
    text.append(block, static_cast<std::size_t>(in.gcount()));
  }
  if (in.bad()) {
    throw ConfigError(path.string() + ": cannot be read");
  }
  return text;
}

WholeFile::WholeFile(const std::filesystem::path& path, const std::filesystem::path& part)
    : path_(path), part_(part.empty() ? std::filesystem::path(path.string() + ".part") : part) {
  fd_ = ::open(part_.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0666);
  if (fd_ < 0) {
    fail("create");
  }
}

WholeFile::~WholeFile() {
  if (fd_ >= 0) {
    ::close(fd_);
    ::unlink(part_.c_str());
  }
}

void WholeFile::fail(const char* what) const {
  throw std::runtime_error(path_.string() + ": cannot " + what + ": " + std::generic_category().message(errno));
}

void WholeFile::write(std::string_view text) {
  while (!text.empty()) {
    const ssize_t n = ::write(fd_, text.data(), text.size());
    if (n >= 0) {
      text.remove_prefix(std::size_t(n));
    } else if (errno != EINTR) {
      fail("write");
    }
  }
}

void WholeFile::add(std::string_view text) {
  waiting_ += text;
  settled_ = false;
  if (waiting_.size() >= kPiece) {
    write(waiting_);
    waiting_.clear();
  }
}

void WholeFile::settle() {
  write(waiting_);
  waiting_.clear();
  if (::fsync(fd_) != 0) {
    fail("write");
  }
  settled_ = true;
}

void WholeFile::publish() {
  if (!settled_) {
    settle();
  }
  if (::rename(part_.c_str(), path_.c_str()) != 0) {
    fail("rename");
  }
  ::close(fd_);
  fd_ = -1;
  const std::filesystem::path folder = path_.parent_path();
  const int folder_fd = ::open(folder.empty() ? "." : folder.c_str(), O_RDONLY | O_DIRECTORY);
  if (folder_fd >= 0) {  // so that the new name, too, survives a loss of power
    ::fsync(folder_fd);
    ::close(folder_fd);
  }
}

}  // namespace kvreplay
