// The target without libFuzzer: CORPUS [N [SEED]] gives it every file of that folder, and then N of them changed
// blindly. The input that it does not survive is left in the working folder.
#include <csignal>
#include <iterator>
#include <random>

#include "tests/fuzz/fuzz.hpp"

namespace {

using Bytes = std::vector<std::uint8_t>;

const Bytes* current = nullptr;  // for the signal handler

void leave_input(int signal) {
  if (std::FILE* file = std::fopen("fuzz_input", "wb")) {
    std::fwrite(current->data(), 1, current->size(), file);
    std::fclose(file);
  }
  std::signal(signal, SIG_DFL);
  std::raise(signal);
}

void run(const Bytes& input) {
  current = &input;
  LLVMFuzzerTestOneInput(input.data(), input.size());
}

// A byte changed, put in or taken out, or a piece of another input put in or over.
void change(Bytes& input, const std::vector<Bytes>& corpus, std::mt19937_64& random) {
  const std::size_t at = random() % (input.size() + 1);
  const auto here = input.begin() + static_cast<std::ptrdiff_t>(at);
  const Bytes& other = corpus[random() % corpus.size()];
  const std::size_t begin = random() % (other.size() + 1), n = random() % (other.size() - begin + 1);
  const auto from = other.begin() + static_cast<std::ptrdiff_t>(begin);
  switch (random() % 5) {
    case 0:
      input.insert(here, static_cast<std::uint8_t>(random()));
      break;
    case 1:
      input.insert(here, from, from + static_cast<std::ptrdiff_t>(std::min<std::size_t>(n, 64)));
      break;
    case 2:
      std::copy_n(from, std::min(n, input.size() - at), here);
      break;
    case 3:
      input.erase(here,
                  here + static_cast<std::ptrdiff_t>(random() % (std::min<std::size_t>(input.size() - at, 16) + 1)));
      break;
    default:
      if (at < input.size()) {
        input[at] = static_cast<std::uint8_t>(random());
      }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: %s CORPUS [N [SEED]]\n", argv[0]);
    return 2;
  }
  for (const int signal : {SIGABRT, SIGSEGV, SIGFPE}) {
    std::signal(signal, leave_input);
  }
  std::vector<std::filesystem::path> paths;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(argv[1])) {
    if (entry.is_regular_file()) {
      paths.push_back(entry.path());
    }
  }
  std::sort(paths.begin(), paths.end());
  std::vector<Bytes> corpus;
  for (const std::filesystem::path& path : paths) {
    std::ifstream in(path, std::ios::binary);
    const std::string bytes{std::istreambuf_iterator<char>(in), {}};
    corpus.emplace_back(bytes.begin(), bytes.end());
    std::printf("%s\n", path.filename().c_str());
    std::fflush(stdout);  // the last name is the one that failed
    run(corpus.back());
  }
  const unsigned long n = argc > 2 ? std::strtoul(argv[2], nullptr, 10) : 0;
  std::mt19937_64 random(argc > 3 ? std::strtoul(argv[3], nullptr, 10) : 1);
  for (unsigned long i = 0; i < n && !corpus.empty(); ++i) {
    Bytes input = corpus[random() % corpus.size()];
    for (std::uint64_t left = 1 + random() % 4; left > 0; --left) {
      change(input, corpus, random);
    }
    run(input);
  }
  std::printf("%zu inputs, %lu changed ones\n", corpus.size(), n);
  return corpus.empty() ? 1 : 0;
}
